"""Command lines as clap reads them, in clap's words: Cloud Hypervisor's users and scripts know both.

Only what `cloud-hypervisor` and `ch-remote` need: long options with zero, one or several values, `-v` that counts,
subcommands with positional arguments. argparse cannot be taught these messages, and takes longer to load than all this.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn

USAGE_ERROR = 2


class Option:
    """One option. `values`: "one", "none", "many" (repeatable, several at once), "maybe" or "count"."""

    __slots__ = ("choices", "default", "group", "help", "name", "short", "values")

    def __init__(
        self,
        name: str,
        help_text: str,
        *,
        values: str = "one",
        short: str | None = None,
        default: str | None = None,
        choices: Sequence[str] = (),
        group: str | None = None,
    ) -> None:
        self.name = name
        self.help = help_text
        self.values = values
        self.short = short
        self.default = default
        self.choices = choices
        self.group = group

    @property
    def display(self) -> str:
        """As clap names it in messages."""
        if self.values == "many":
            return f"--{self.name} <{self.name}>..."
        return f"--{self.name} <{self.name}>" if self.values in ("one", "maybe") else f"--{self.name}"


class Positional:
    __slots__ = ("default", "help", "name", "required")

    def __init__(self, name: str, help_text: str, *, required: bool = True, default: str | None = None) -> None:
        self.name = name
        self.help = help_text
        self.required = required
        self.default = default

    @property
    def display(self) -> str:
        return f"<{self.name}>" if self.required else f"[{self.name}]"


class Command:
    """A program or one of its subcommands."""

    def __init__(
        self,
        name: str,
        about: str,
        options: Sequence[Option] = (),
        positionals: Sequence[Positional] = (),
        commands: Sequence[Command] = (),
    ) -> None:
        self.name = name
        self.about = about
        self.options = options
        self.positionals = positionals
        self.commands = {command.name: command for command in commands}

    def usage(self) -> str:
        parts = [self.name.replace(":", " ")]
        if self.options:
            parts.append("[OPTIONS]")
        parts.extend(positional.display for positional in self.positionals)
        if self.commands:
            parts.append("<COMMAND>")
        return " ".join(parts)

    def fail(self, message: str, *, usage: bool = True) -> NoReturn:
        """Print clap's error and end the process with status 2."""
        lines = [f"error: {message}", ""]
        if usage:
            lines += [f"Usage: {self.usage()}", ""]
        sys.stderr.write("\n".join([*lines, "For more information, try '--help'.", ""]))
        raise SystemExit(USAGE_ERROR)

    def help_text(self) -> str:
        lines = [self.about, "", f"Usage: {self.usage()}", ""]
        if self.commands:
            lines.append("Commands:")
            lines += [f"  {name:<24}{command.about}" for name, command in sorted(self.commands.items())]
            lines.append("")
        if self.positionals:
            lines.append("Arguments:")
            lines += [f"  {positional.display}  {positional.help}" for positional in self.positionals]
            lines.append("")
        lines.append("Options:")
        for option in self.options:
            short = f"-{option.short}, " if option.short else "    "
            lines.append(f"  {short}{option.display}")
            default = f" [default: {option.default}]" if option.default else ""
            choices = f" [possible values: {', '.join(option.choices)}]" if option.choices else ""
            lines.append(f"          {option.help}{default}{choices}")
        lines.append("  -h, --help")
        lines.append("          Print help")
        return "\n".join([*lines, ""])

    def parse(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Values by option and positional name; what was not given is absent. A subcommand is under "command"."""
        for argument in arguments:
            try:
                argument.encode()
            except UnicodeEncodeError:
                self.fail("invalid UTF-8 was detected in one or more arguments")
        return _Parse(self, list(arguments)).run()


class _Parse:
    """One pass over the arguments of a command."""

    def __init__(self, command: Command, arguments: list[str]) -> None:
        self.command = command
        self.rest = arguments
        self.values: dict[str, Any] = {}
        self.loose: list[str] = []
        self.by_name = {f"--{option.name}": option for option in command.options}
        self.by_short = {f"-{option.short}": option for option in command.options if option.short}

    def run(self) -> dict[str, Any]:
        only_positionals = False
        while self.rest:
            argument = self.rest.pop(0)
            if only_positionals or argument == "-" or not argument.startswith("-"):
                if self.command.commands:
                    self._subcommand(argument)
                    return self.values
                self._positional(argument)
            elif argument == "--":
                only_positionals = True
            elif argument in ("-h", "--help"):
                sys.stdout.write(self.command.help_text())
                raise SystemExit(0)
            elif argument.startswith("--"):
                self._long(argument)
            else:
                self._short(argument)
        if self.command.commands:
            self.command.fail(f"'{self.command.name}' requires a subcommand but one was not provided")
        missing = [p for p in self.command.positionals[len(self.loose) :] if p.required]
        if missing:
            listed = "".join(f"\n  {positional.display}" for positional in missing)
            self.command.fail(f"the following required arguments were not provided:{listed}")
        for positional in self.command.positionals[len(self.loose) :]:
            if positional.default is not None:
                self.values[positional.name] = positional.default
        return self.values

    def _subcommand(self, name: str) -> None:
        command = self.command.commands.get(name)
        if command is None:
            self.command.fail(f"unrecognized subcommand '{name}'")
        full = Command(f"{self.command.name} {name}", command.about, command.options, command.positionals)
        self.values["command"] = (name, full.parse(self.rest))
        self.rest = []

    def _positional(self, argument: str) -> None:
        if len(self.loose) >= len(self.command.positionals):
            self.command.fail(f"unexpected argument '{argument}' found")
        self.values[self.command.positionals[len(self.loose)].name] = argument
        self.loose.append(argument)

    def _short(self, argument: str) -> None:
        for letter in argument[1:]:
            option = self.by_short.get(f"-{letter}")
            if option is None or option.values not in ("count", "none"):
                self.command.fail(f"unexpected argument '{argument}' found")
            self._set(option, None)

    def _long(self, argument: str) -> None:
        name, equals, value = argument.partition("=")
        option = self.by_name.get(name)
        if option is None:
            self.command.fail(f"unexpected argument '{name}' found{self._tip(name)}")
        if option.values in ("none", "count"):
            if equals:
                self.command.fail(f"unexpected value '{value}' for '{option.display}' found; no more were expected")
            self._set(option, None)
        elif equals:
            self._set(option, value)
        else:
            self._set_from_rest(option)

    def _set_from_rest(self, option: Option) -> None:
        taken = 0
        while self.rest and (self.rest[0] == "-" or not self.rest[0].startswith("-")):
            self._set(option, self.rest.pop(0), more=taken > 0)
            taken += 1
            if option.values != "many":
                return
        if taken == 0:
            if option.values == "maybe":
                self._set(option, "")
                return
            self.command.fail(f"a value is required for '{option.display}' but none was supplied", usage=False)

    def _set(self, option: Option, value: str | None, *, more: bool = False) -> None:
        if option.values == "count":
            self.values[option.name] = self.values.get(option.name, 0) + 1
        elif option.values == "many":
            self.values.setdefault(option.name, []).append(value)
        elif option.name in self.values and not more:
            self.command.fail(f"the argument '{option.display}' cannot be used multiple times")
        else:
            if option.choices and value not in option.choices:
                listed = ", ".join(option.choices)
                self.command.fail(
                    f"invalid value '{value}' for '{option.display}'\n  [possible values: {listed}]", usage=False
                )
            self.values[option.name] = True if value is None else value

    def _tip(self, name: str) -> str:
        from difflib import get_close_matches

        close = get_close_matches(name, self.by_name, n=1, cutoff=0.7)
        return f"\n\n  tip: a similar argument exists: '{close[0]}'" if close else ""
