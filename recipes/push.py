"""Push to the Hub what a recipe left in a folder: a student, or a dataset with neighbours.

    python recipes/push.py my-student --repo_id USER/my-student --private
    python recipes/push.py images-with-neighbors --repo_id USER/images-with-neighbors

It pushes what could not be pushed when its run ended. The token is that of `hf auth login` or HF_TOKEN.
"""

from coss_hf.cli.help import as_commands, show_help

show_help(__name__, "push")

import argparse

from coss_hf.cli import bad_input_exits, stopped_run_exits
from coss_hf.cli.paths import path
from coss_hf.hub.push import check_name, push, push_dataset


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="coss-hf push", description=as_commands(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=path, help="Output folder of coss-hf distill or coss-hf neighbors.")
    parser.add_argument("--repo_id", required=True, help="Repository USER/NAME, which is created if it does not exist.")
    parser.add_argument("--private", action="store_true", help="Create a repository that its owner alone can see.")
    parser.add_argument("--revision", help="Branch to push a student to. Default: main.")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    is_dataset = (args.folder / "dataset_dict.json").is_file()
    with bad_input_exits():
        check_name(args.repo_id, "--repo_id")
        if not is_dataset and not (args.folder / "config.json").is_file():
            raise ValueError(f"{args.folder} holds no student and no dataset; give the output folder of a recipe.")
        if is_dataset and args.revision:
            raise ValueError(f"--revision={args.revision}: datasets are pushed to main; leave it out.")
    private = args.private or None  # False would make a public one where an organisation's are private by default
    with stopped_run_exits():
        if is_dataset:
            push_dataset(args.folder, args.repo_id, private=private)
        else:
            push(args.folder, args.repo_id, private=private, revision=args.revision)


if __name__ == "__main__":
    main()
