"""The command line that all experiments share."""

import jax

from experiments.common import cli, evaluate, log, rehearsal, run


def main(default: cli.Config, description: str) -> None:
  """Runs what the command line asks for, and prints the table.

  Args:
    default: what the experiment takes where an option is not given.
    description: text of --help.
  """
  with evaluate.explained_errors():
    config = cli.parse(default, description)
    if config.dry_run:
      print(rehearsal.rehearse(config))
      return
    result = run.run(config)
  if jax.process_index() == 0:
    print(f"\n{log.table(result)}\n\n{result['method']}\n{config.directory}")
