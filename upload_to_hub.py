# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Put an official LocateAnything checkpoint and this project's code together: a folder, a repository, a pull request.

`python upload_to_hub.py --help` names the ways; `hub/` holds what they do.
"""

import argparse
import difflib
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from hub.assembly import assemble, check_target, plan, preview_base, print_plan, remote_code_files
from hub.card import CODE_ONLY, OWN, PULL_REQUEST, loading_lines
from hub.errors import AssemblyError, HubError, PublishError, first_line
from hub.planning import Publication, plan_pull_request, plan_repository, print_publication, warnings_of
from hub.publishing import publish, with_open_pull
from hub.verifying import IMAGE, QUESTION, print_verification, verify

__all__ = ["AssemblyError", "assemble", "main", "remote_code_files"]

COMMANDS = ("assemble", "repo", "code", "pr", "verify")


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments, those of the process by default.

    Returns:
        The exit code.
    """
    given = sys.argv[1:] if argv is None else argv
    if given and given[0].startswith("-") and given[0] not in ("-h", "--help"):
        given = ["assemble", *given]
    try:
        _check_command(given)
        args = _parser().parse_args(given)
        _check_texts(args)
        return int(args.run(args))
    except (HubError, OSError) as error:
        print(f"upload_to_hub.py: {first_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        state = str(interrupt) or "nothing was published. The same command goes on"
        print(f"upload_to_hub.py: interrupted; {state}.", file=sys.stderr)
        return 130


def _check_command(given: list[str]) -> None:
    if given and not given[0].startswith("-") and given[0] not in COMMANDS:
        near = difflib.get_close_matches(given[0], COMMANDS, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise PublishError(f"command: got {given[0]!r}, expected one of {', '.join(COMMANDS)}{meant}")


def _check_texts(args: argparse.Namespace) -> None:
    """An empty text is a variable that was not set, and no way to say "the default"."""
    for name in ("repo", "base", "revision", "local_dir"):
        if getattr(args, name, None) == "":
            raise PublishError(f"{name}: got an empty text, expected one, or no {name} at all")


def _assemble(args: argparse.Namespace) -> int:
    if args.dry_run:
        target = check_target(args.base, args.local_dir, args.overwrite)
        local = Path(args.base).expanduser().is_dir()
        base = preview_base(args.base, args.revision, local=local)
        print_plan(plan(base, args.weights), base, target)
        if not local:
            print("Configs and tokenizer were downloaded to the hub's cache.")
        return 0
    target = assemble(
        args.base, args.local_dir, revision=args.revision, weights=args.weights, overwrite=args.overwrite
    )
    print(f"Built {target}. It loads with")
    print(f'    AutoModel.from_pretrained("{target}", trust_remote_code=True)')
    return 0


def _repository(args: argparse.Namespace) -> int:
    kind = OWN if args.command == "repo" else CODE_ONLY
    upload = kind == OWN and args.upload
    publication = plan_repository(args.base, args.repo, args.revision, kind=kind, upload=upload, private=args.private)
    return _publish(publication, args)


def _pull_request(args: argparse.Namespace) -> int:
    return _publish(plan_pull_request(args.repo), args)


def _publish(publication: Publication, args: argparse.Namespace) -> int:
    private = getattr(args, "private", False)
    if args.dry_run:
        if publication.kind == PULL_REQUEST:
            # Whose pull requests to look for is known by the token
            unknown = replace(publication, notes=("without a token it is not known whether one of yours is open",))
            publication = with_open_pull(publication) if get_token() else unknown
        print_publication(publication, private=private)
        return 0
    for line in warnings_of(publication):
        print(line)
    published = publish(publication, private=private)
    print(f"{published.outcome} {published.url}")
    print("It loads with")
    for line in loading_lines(publication.kind, args.repo, publication.origin, published.revision):
        print(f"    {line}")
    revision = f" --revision {published.revision}" if published.revision else ""
    base = f" --base {shlex.quote(publication.origin.name)}" if publication.origin.commit is None else ""
    print(f"To check it: python upload_to_hub.py verify {args.repo}{revision}{base}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    if args.dry_run:
        print_verification(args.repo, args.revision, args.base)
        return 0
    found = verify(args.repo, args.revision, args.base, image=args.image, question=args.question)
    for line in found.lines:
        print(line)
    return 0 if found.same else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="upload_to_hub.py",
        description="Put an official LocateAnything checkpoint and this project's code together.",
        epilog="""examples:
  python upload_to_hub.py --base nvidia/LocateAnything-3B --local-dir LocateAnything-3B-batched
  python upload_to_hub.py repo me/LocateAnything-3B-batched --base nvidia/LocateAnything-3B --dry-run
  python upload_to_hub.py code me/locateanything-code --base nvidia/LocateAnything-3B
  python upload_to_hub.py pr nvidia/LocateAnything-3B
  python upload_to_hub.py verify nvidia/LocateAnything-3B --revision refs/pr/7

Without a command it is `assemble`. The token comes from HF_TOKEN or `hf auth login`. What a command publishes appears
in one commit or not at all; an interrupted command goes on when it is run again.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    local = _command(
        commands,
        "assemble",
        _assemble,
        "build a loadable folder",
        """examples:
  python upload_to_hub.py --base demo/checkpoint --local-dir demo-batched --weights copy
  python upload_to_hub.py --base nvidia/LocateAnything-3B --revision main --local-dir out --dry-run""",
    )
    _add_base(local, "folder in the official format, or hub id")
    local.add_argument("--local-dir", required=True, metavar="DIR", help="folder to build")
    local.add_argument(
        "--weights",
        choices=("link", "copy"),
        default="link",
        help="link the base's weights where the file system can (default), or copy them",
    )
    local.add_argument("--overwrite", action="store_true", help="replace the model folder that stands at DIR")

    own = _command(
        commands,
        "repo",
        _repository,
        "publish a repository of your own: the code and the weights",
        """examples:
  python upload_to_hub.py repo me/LocateAnything-3B-batched --base nvidia/LocateAnything-3B
  python upload_to_hub.py repo me/finetuned-batched --base ./finetuned --private""",
    )
    own.add_argument("repo", help="hub id of the repository; it is created if there is none")
    _add_base(own, "folder in the official format, or hub id; the hub copies the latter's weights where it can")
    own.add_argument("--private", action="store_true", help="make a new repository private")
    own.add_argument("--upload", action="store_true", help="send the weights from here, never let the hub copy them")

    code = _command(
        commands,
        "code",
        _repository,
        "publish a repository with the code alone, for the weights of another",
        """examples:
  python upload_to_hub.py code me/locateanything-code --base nvidia/LocateAnything-3B""",
    )
    code.add_argument("repo", help="hub id of the repository; it is created if there is none")
    _add_base(code, "hub id of the repository with the weights")
    code.add_argument("--private", action="store_true", help="make a new repository private")

    pull = _command(
        commands,
        "pr",
        _pull_request,
        "open a pull request that adds the code to a LocateAnything repository",
        """examples:
  python upload_to_hub.py pr nvidia/LocateAnything-3B --dry-run
  python upload_to_hub.py pr nvidia/LocateAnything-3B""",
    )
    pull.add_argument("repo", help="hub id of the repository; you need not be able to write to it")

    check = _command(
        commands,
        "verify",
        _verify,
        "download what was published and compare it with this code",
        """examples:
  python upload_to_hub.py verify me/LocateAnything-3B-batched
  python upload_to_hub.py verify nvidia/LocateAnything-3B --revision refs/pr/7""",
    )
    check.add_argument("repo", help="hub id of what was published")
    check.add_argument("--revision", help="branch, tag, commit or refs/pr/N; main by default")
    check.add_argument("--base", help="what it was made of, if its card does not say: folder or hub id")
    check.add_argument("--image", type=Path, default=IMAGE, help="picture to ground")
    check.add_argument("--question", default=QUESTION, help="what to ask about it")
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], purpose: str, examples: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=purpose,
        description=purpose[0].upper() + purpose[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print files, sizes and operations; of a hub id, only weights and code are not downloaded",
    )
    parser.set_defaults(run=run)
    return parser


def _add_base(parser: argparse.ArgumentParser, meaning: str) -> None:
    parser.add_argument("--base", required=True, help=meaning)
    parser.add_argument("--revision", help="branch, tag or commit of the hub id")


if __name__ == "__main__":
    sys.exit(main())
