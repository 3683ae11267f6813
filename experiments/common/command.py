"""The command line that all experiments share."""

from experiments.common import cli, errors, processes, terminal
from experiments.common.runner import record, rehearsal, run


def main(default: cli.Config, description: str) -> None:
  """Runs what the command line asks for, and prints the table.

  Args:
    default: what the experiment takes where an option is not given.
    description: text of --help.
  """
  with errors.explained():
    config = cli.parse(default, description)
  with processes.joined(config.distributed), errors.explained():
    if config.dry_run:
      terminal.say(rehearsal.rehearse(config))
      return
    result = run.run(config)
  if processes.leads():
    text = record.text(result)
    terminal.say(f"\n{text}\n\n{result['method']}\n{config.directory}")
