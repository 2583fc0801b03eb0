# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""Put an official LocateAnything checkpoint and this project's code together: a folder, a repository, a pull request.

`python upload_to_hub.py --help` names the ways; `hub/` holds what they do.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hub.assembly import assemble, check_target, open_base, plan, print_files, remote_code_files
from hub.card import auto_class, loading_lines
from hub.errors import HubError, explain
from hub.publishing import Publication, plan_pull_request, plan_repository, print_publication, publish
from hub.verifying import IMAGE, QUESTION, verify

__all__ = ["HubError", "assemble", "main", "remote_code_files"]

EPILOG = """examples:
  python upload_to_hub.py --base nvidia/LocateAnything-3B --local-dir LocateAnything-3B-batched
  python upload_to_hub.py repo me/LocateAnything-3B-batched --base nvidia/LocateAnything-3B --dry-run
  python upload_to_hub.py code me/locateanything-code --base nvidia/LocateAnything-3B
  python upload_to_hub.py pr nvidia/LocateAnything-3B --opt-in
  python upload_to_hub.py verify nvidia/LocateAnything-3B --revision refs/pr/7

Without a command it is `assemble`. The token comes from HF_TOKEN or `hf auth login`. What a command publishes appears
in one commit or not at all; an interrupted command goes on when it is run again. docs/publishing.md has more."""


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
    args = _parser().parse_args(given)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("upload_to_hub.py: interrupted; the same command goes on, or says that all is there.", file=sys.stderr)
        return 130
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        print(f"upload_to_hub.py: {line}", file=sys.stderr)
        return 1
    return 0


def _assemble(args: argparse.Namespace) -> None:
    if args.dry_run:
        target = check_target(args.base, args.local_dir, args.overwrite)
        base = open_base(args.base, args.revision, download=False)
        print_files(plan(base), base, link=args.weights == "link")
        print(f"{base.folder} -> {target}. Nothing was written.")
        return
    target = assemble(
        args.base, args.local_dir, revision=args.revision, weights=args.weights, overwrite=args.overwrite
    )
    print(f"Built {target}. It loads with")
    print(f'    AutoModel.from_pretrained("{target}", trust_remote_code=True)')


def _repository(args: argparse.Namespace) -> None:
    code_only = args.command == "code"
    publication = plan_repository(args.base, args.repo, args.revision, code_only=code_only, private=args.private)
    weights = {"base": args.base, "base_revision": args.revision} if code_only else {}
    _publish(publication, args, **weights)


def _pull_request(args: argparse.Namespace) -> None:
    publication = plan_pull_request(args.repo, args.variant, args.project_url)
    _publish(publication, args, auto=auto_class(args.variant))


def _publish(publication: Publication, args: argparse.Namespace, **loading: Any) -> None:
    private = getattr(args, "private", False)
    if args.dry_run:
        print_publication(publication, private=private)
        return
    for line in publication.notes:
        print(line)
    outcome, revision = publish(publication, private=private)
    print(f"{outcome}\nIt loads with")
    for line in loading_lines(args.repo, revision, **loading):
        print(f"    {line}")
    at = f" --revision {revision}" if revision else ""
    print(f"To check it: python upload_to_hub.py verify {args.repo}{at}")


def _verify(args: argparse.Namespace) -> None:
    print(verify(args.repo, args.revision, args.base, image=args.image, question=args.question))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="upload_to_hub.py",
        description="Put an official LocateAnything checkpoint and this project's code together.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], None], purpose: str, base: str = "") -> Any:
        command = commands.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
        command.set_defaults(run=run)
        if name != "assemble":
            command.add_argument("repo", help="hub id of the repository")
        if base:
            command.add_argument("--base", required=True, help=base)
            command.add_argument("--revision", help="branch, tag or commit of the hub id")
        if name != "verify":
            command.add_argument("--dry-run", action="store_true", help="print files and sizes, and change nothing")
        return command

    a_base = "folder in the official format, or hub id"
    local = add("assemble", _assemble, "build a loadable folder", a_base)
    local.add_argument("--local-dir", required=True, metavar="DIR", help="folder to build")
    local.add_argument("--weights", choices=("link", "copy"), default="link", help="what is done with the base's")
    local.add_argument("--overwrite", action="store_true", help="replace the model folder that stands at DIR")

    own = add("repo", _repository, "publish a repository: code and weights", a_base)
    code = add("code", _repository, "publish the code alone, for the weights of another repository", "its hub id")
    for command in (own, code):
        command.add_argument("--private", action="store_true", help="make a new repository private")

    pull = add("pr", _pull_request, "open a pull request that adds the code to a LocateAnything repository")
    kind = pull.add_mutually_exclusive_group()
    for variant, meaning in (("opt-in", "leave AutoModel as it is"), ("processor", "add our processor too")):
        kind.add_argument(f"--{variant}", dest="variant", action="store_const", const=variant, help=meaning)
    pull.set_defaults(variant="default")
    pull.add_argument("--project-url", help="address of this project, for the description")

    check = add("verify", _verify, "load what was published and ask it a question")
    check.add_argument("--revision", help="branch, tag, commit or refs/pr/N; main by default")
    check.add_argument("--base", help="the weights' repository of one with the code alone, if its card does not say")
    check.add_argument("--image", type=Path, default=IMAGE, help="picture to ask about")
    check.add_argument("--question", default=QUESTION, help="what to ask about it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
