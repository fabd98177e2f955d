"""`runstream completion`: the shell's completion script."""

from __future__ import annotations

import click

from .command import Command, session_of

__all__ = ["completion"]


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of SHELL: commands, options, and names of runs and experiments.

    \b
    bash:  echo 'eval "$(runstream completion bash)"' >> ~/.bashrc
    zsh:   echo 'eval "$(runstream completion zsh)"' >> ~/.zshrc
    fish:  runstream completion fish > ~/.config/fish/completions/runstream.fish
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None, "click lost a shell it had"
    from .app import COMPLETE_VARIABLE, PROGRAM

    made = found(context.find_root().command, {}, PROGRAM, COMPLETE_VARIABLE)
    source = made.source_template % made.source_vars()  # `source()` would start bash to ask for its version
    out = session_of(context).output
    if out.json:
        out.value({"shell": shell, "script": source})
    else:
        out.write(source)
