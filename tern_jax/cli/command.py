"""The commands, and their options."""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tern_jax import export
from tern_jax.cli import output, reports, sources
from tern_jax.export import files
from tern_jax.inference import doctor
from tern_jax.storage.leaves import printable
from tern_jax.version import __version__

_ABOUT = (
  "Looks at what tern_jax saves: checkpoints, training runs, and exported"
  " .safetensors and .gguf files."
)
_STATUS = (
  "Exit status: 0 if all is well; 1 if leaves are damaged (inspect, verify) or"
  " differ (diff); 2 if the command could not do its work, with one line that"
  " says why; 130 if it was interrupted; 141 if nobody reads what it prints."
)
_PATHS = (
  "a checkpoint; a training run, of which the latest step is taken, or one of"
  " its steps; a folder with one of these in it, as experiments write; a"
  " .safetensors or .gguf file written by tern_jax. Checkpoints and runs may be"
  " in a bucket, gs://bucket/path."
)
_INSPECT = "Shows zeros, bits, entropy, scales and checksums, by layer."
_VERIFY = (
  "Checks every array. Damage to the arrays of a leaf is reported for this"
  " leaf; damage to the index that all leaves of a part share, for each of"
  " them, since any may be damaged. Of a .gguf file, which has no checksums, it"
  " checks the structure, and that all values are finite."
)
_DIFF = "Counts the codes that flipped from a to b, by layer."
_EXPORT = (
  "Writes a file for other runtimes; all but .gguf files can be its source."
)
_DOCTOR = (
  "Tells what multiplies packed weights here, and how fast. Nothing else should"
  " run on this machine meanwhile."
)
_SHA256 = (
  "print a digest of the content as well, which is the same for equal content"
  " in any codec; publish it, and give it to load_packed(sha256=)"
)
#: How a message names an argument, at its start or end, and what to type.
_ARGUMENTS = {
  "pass overwrite=True.": "pass --overwrite.",
  "codec='entropy' needs": "--codec entropy needs",
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command of `argv`, or of the process; returns its exit status.

  Raises:
    OutputError: what it found could not be printed.
    SystemExit: `argv` is no command, or asks for help.
  """
  options = _parser().parse_args(argv)
  try:
    return options.run(options)
  except output.OutputError:
    raise
  except Exception as error:  # whatever a file holds: no traceback
    complain(options.command, _reason(error, options.command))
    return 2


def complain(command: str, reason: str) -> None:
  """Prints why a command could not do its work, in one line."""
  try:
    if sys.stderr is not None:  # which would be standard output
      print(f"tern_jax {command}".rstrip() + f": {reason}", file=sys.stderr)
  except OSError:
    pass  # Nobody reads it.


def _reason(error: Exception, command: str) -> str:
  reason = str(error)
  if isinstance(error, OSError) and error.filename and error.strerror:
    reason = f"{error.filename}: {error.strerror}"
  reason = printable(" ".join(reason.split()), sys.maxsize)
  if not isinstance(error, ValueError | OSError | ImportError):
    return f"{type(error).__name__}: {reason}"
  for argument, option in _ARGUMENTS.items() if command == "export" else ():
    if reason.endswith(argument):
      reason = reason.removesuffix(argument) + option
    elif reason.startswith(argument):
      reason = option + reason.removeprefix(argument)
  return reason


class _Parser(argparse.ArgumentParser):
  def print_help(self, file: Any = None) -> None:
    """Prints the help; argparse would not say that it cannot."""
    output.write(self.format_help().rstrip())


def _parser() -> argparse.ArgumentParser:
  parser = _Parser("python -m tern_jax", description=_ABOUT, epilog=_STATUS)
  version = f"tern_jax {__version__}"
  parser.add_argument("--version", action="version", version=version)
  commands = parser.add_subparsers(
    dest="command", required=True, title="commands"
  )

  def add(run: Callable, about: str, *paths: str) -> Any:
    name = run.__name__.lstrip("_")
    first, _, _ = about.partition(". ")
    command = commands.add_parser(
      name, help=first.rstrip("."), description=about, epilog=_STATUS
    )
    command.set_defaults(run=run)
    for path in paths:
      command.add_argument(
        path, help="what to compare it with" if path == "b" else _PATHS
      )
    if run is not _export:
      command.add_argument(
        "--json", action="store_true", help="print JSON, for programs"
      )
    return command

  add(reports.inspect, _INSPECT, "path")
  command = add(reports.verify, _VERIFY, "path")
  command.add_argument("--sha256", action="store_true", help=_SHA256)
  add(reports.diff, _DIFF, "a", "b")
  _export_options(add(_export, _EXPORT, "path"))
  add(_doctor, _DOCTOR)
  return parser


def _export_options(command: Any) -> None:
  command.add_argument("out", help="file to write; its folder is made")
  command.add_argument(
    "--to", choices=export.FORMATS, required=True, help="format of the file"
  )
  chain = (w.options.items() for w in export.FORMATS.values())
  for name, facts in dict(itertools.chain.from_iterable(chain)).items():
    users = [k for k, w in export.FORMATS.items() if name in w.options]
    about = f"for --to {', '.join(users)}"
    if "default" in facts:
      about += f"; {facts['default']} by default"
    # Without a default here, it is known what was given.
    facts = {"help": about, **facts, "default": argparse.SUPPRESS}
    command.add_argument(_flag(name), **facts)
  about = "replace the file, once the new one is written"
  command.add_argument("--overwrite", action="store_true", help=about)


def _flag(name: str) -> str:
  return f"--{name.replace('_', '-')}"


def _export(options: argparse.Namespace) -> int:
  writer = export.FORMATS[options.to]
  if writer.write is None:
    raise ValueError(writer.refusal)
  offered = {k for w in export.FORMATS.values() for k in w.options}
  given = {k: v for k, v in vars(options).items() if k in offered}
  if strange := sorted(map(_flag, given.keys() - writer.options.keys())):
    raise ValueError(f"--to {options.to} has no option {', '.join(strange)}.")
  _check_name(options)
  # Rather now than after a large file was read.
  if writer.folder:
    files.free_folder(options.out, options.overwrite, writer.folder)
  else:
    files.free_file(options.out, options.overwrite)
  defaults = {
    k: x["default"] for k, x in writer.options.items() if "default" in x
  }
  given = defaults | given
  tree = sources.load(options.path)
  errors = writer.write(options.out, tree, overwrite=options.overwrite, **given)
  if errors:
    lines = (f"{k}: relative RMS error {x:.1e}" for k, x in errors.items())
    output.show({}, lines, as_json=False)
  return 0


def _doctor(options: argparse.Namespace) -> int:
  found = doctor.examine()
  output.show(found, doctor.lines(found), options.json)
  return 0


def _check_name(options: argparse.Namespace) -> None:
  """Raises if the name of the file is that of another format."""
  end = os.path.splitext(options.out)[1].removeprefix(".")
  if end in export.FORMATS and end != options.to:
    hint = f"choose --to {end}, or another name"
    raise ValueError(
      f"{options.out}: --to {options.to} writes no .{end} file: {hint}."
    )
