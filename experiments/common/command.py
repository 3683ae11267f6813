"""The command line that all experiments share."""

from experiments.common import (
  cli,
  evaluate,
  log,
  processes,
  rehearsal,
  run,
)


def main(default: cli.Config, description: str) -> None:
  """Runs what the command line asks for, and prints the table.

  Args:
    default: what the experiment takes where an option is not given.
    description: text of --help.
  """
  with evaluate.explained_errors():
    config = cli.parse(default, description)
  with processes.joined(config.distributed), evaluate.explained_errors():
    if config.dry_run:
      print(rehearsal.rehearse(config))
      return
    result = run.run(config)
  if processes.leads():
    print(f"\n{log.table(result)}\n\n{result['method']}\n{config.directory}")
