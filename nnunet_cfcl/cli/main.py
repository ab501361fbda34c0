"""Entry point of the command ``nnunet_cfcl VERB``.

The file of a verb has a function ``add_..._parser(subparsers)``, which adds a sub-parser and sets its default ``run``:
a function of the parsed arguments that returns the exit status. A verb that passes unknown arguments on to a command of
nnU-Net sets ``passes_on`` and reads them from ``others``. The file is imported when its verb is called, which keeps
light verbs fast.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import nnunet_cfcl
from nnunet_cfcl.errors import UserError

# verb: function that adds its parser, help line (a test compares it with that of the parser)
VERBS = {
    "trainers-path": ("nnunet_cfcl.cli.installation:add_trainers_path_parser",
                      "print the folder for nnUNet_extTrainer"),
    "install": ("nnunet_cfcl.cli.installation:add_install_parser",
                "install the trainers into this nnU-Net installation"),
    "uninstall": ("nnunet_cfcl.cli.installation:add_uninstall_parser",
                  "remove the trainers from this nnU-Net installation"),
    "doctor": ("nnunet_cfcl.cli.doctor:add_doctor_parser", "check installation, plan, data and device"),
    "trainers": ("nnunet_cfcl.cli.trainers:add_trainers_parser",
                 "print every trainer and what its pretraining uses"),
    "settings": ("nnunet_cfcl.cli.settings:add_settings_parser", "print every setting, its default and its meaning"),
    "export-stock": ("nnunet_cfcl.cli.export_stock:add_export_stock_parser",
                     "write a trained fold as a stock nnU-Net model"),
    "counterfactuals": ("nnunet_cfcl.cli.counterfactuals:add_counterfactuals_parser",
                        "import counterfactual images from elsewhere"),
    "pool": ("nnunet_cfcl.cli.pool:add_pool_parser",
             "preprocess unlabelled images (imagesUn) and AI-made labels (labelsSilver)"),
    "silver": ("nnunet_cfcl.cli.silver:add_silver_parser",
               "label the pool (imagesUn) with a trained model (labelsSilver)"),
    "generator": ("nnunet_cfcl.cli.generator:add_generator_parser",
                  "train, evaluate and use a generator of counterfactuals"),
    "attributes": ("nnunet_cfcl.cli.attributes:add_attributes_parser",
                   "propose acquisition groups (scanners) and write attributes.csv"),
    "predict": ("nnunet_cfcl.cli.chromap:add_predict_parser",
                "nnU-Net's prediction, with CHRO-maps beside the masks"),
    "chromap": ("nnunet_cfcl.cli.chromap:add_chromap_parser",
                "write CHRO-maps of images, without masks"),
    "evaluate": ("nnunet_cfcl.cli.evaluate:add_evaluate_parser",
                 "measure masks against the truth, per label and group, and compare methods"),
    "probe": ("nnunet_cfcl.cli.probe:add_probe_parser",
              "measure frozen features: linear probe, clusters, invariance"),
    "report": ("nnunet_cfcl.cli.report:add_report_parser",
               "write one HTML page about a trained fold, or compare several"),
    "demo": ("nnunet_cfcl.cli.demo:add_demo_parser",
             "nnU-Net alone beside the plugin on two scanners, on synthetic patients or your own dataset"),
    "phantom": ("nnunet_cfcl.cli.phantom:add_phantom_parser",
                "write a dataset of synthetic patients with true counterfactuals"),
}


def build_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """Build the parser of a verb; None: a parser that lists all verbs without importing them."""
    parser = argparse.ArgumentParser(
        prog="nnunet_cfcl", description="Counterfactual contrastive pretraining for nnU-Net v2.",
        epilog="Training itself is nnU-Net's own command: nnUNetv2_train DATASET CONFIG FOLD -tr nnUNetTrainerDVDCL")
    parser.add_argument("--version", action="version", version=f"%(prog)s {nnunet_cfcl.__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    if verb is None:
        for name, (_, line) in VERBS.items():
            subparsers.add_parser(name, help=line)
    else:
        module, function = VERBS[verb][0].split(":")
        getattr(importlib.import_module(module), function)(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb.

    Args:
        argv: arguments after the program name; None: those of the process.

    Returns:
        Exit status: 0 success, 1 an error that the user can fix (one line on stderr), 130 interrupted. Wrong usage
        exits with 2, as in argparse.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    verb = argv[0] if argv and argv[0] in VERBS else None
    parser = build_parser(verb)
    arguments, others = parser.parse_known_args(argv)
    if others and not getattr(arguments, "passes_on", False):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    arguments.others = others
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        print(f"nnunet_cfcl {arguments.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"nnunet_cfcl {arguments.verb}: interrupted", file=sys.stderr)
        return 130
