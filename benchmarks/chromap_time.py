"""Time and memory of a prediction with CHRO-maps against nnU-Net's own prediction, in the same run.

Both predict the same images with the same weights by `predict_from_files`, with worker processes, in turns; the first
turn of each is discarded. The model must have a colour space, which trainings of the plugin write; fitting is not
included. Memory is the peak resident set of a separate process, without workers.

    python benchmarks/chromap_time.py -m MODEL_FOLDER -i IMAGES -device cpu --out benchmark_results

With ``--simulate 512 512 400`` instead of a model, only memory is measured, for a volume of this size (x, y, z) and a
network whose features take no time.

    python benchmarks/chromap_time.py --simulate 512 512 400
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pretraining_setup import write_result
from torch import Tensor, nn

MIB = 2**20


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", type=Path, help="model folder")
    parser.add_argument("-i", type=Path, help="folder of images")
    parser.add_argument("-f", default="0", help="fold")
    parser.add_argument("-device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, help="at most so many images of the folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="chromap_time", help="of the result file")
    parser.add_argument("--simulate", type=int, nargs=3, metavar=("X", "Y", "Z"))
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"))
    return parser.parse_args()


def predictor_of(kind: str, arguments: argparse.Namespace) -> Any:
    """Create nnU-Net's predictor, or the predictor with CHRO-maps."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from nnunet_cfcl.chromap.nnunet.predictor import ChromapPredictor

    torch.set_num_threads(arguments.threads)
    predictor = (nnUNetPredictor if kind == "stock" else ChromapPredictor)(
        device=torch.device(arguments.device), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(arguments.m), (arguments.f,))
    return predictor


def predict(kind: str, arguments: argparse.Namespace, images: list[list[str]]) -> float:
    """Seconds of one prediction."""
    predictor = predictor_of(kind, arguments)
    with tempfile.TemporaryDirectory() as out:
        outputs = [str(Path(out) / Path(one[0]).name.split("_0000")[0]) for one in images]
        started = time.perf_counter()
        predictor.predict_from_files(
            images, outputs, num_processes_preprocessing=1, num_processes_segmentation_export=1)
        seconds = time.perf_counter() - started
        if kind != "stock" and len(list((Path(out) / "chromap").glob("*.png"))) != len(images):
            raise RuntimeError("some maps were not made")
    return seconds


def peak_of(target: Any, *arguments: Any) -> dict[str, float]:
    """Run a function in a separate process and return its result and peak memory in MiB."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_report, args=(theirs, target, arguments))
    process.start()
    found: dict[str, float] = mine.recv()
    process.join()
    return found


def _report(pipe: Any, target: Any, arguments: tuple[Any, ...]) -> None:
    result = target(*arguments)
    pipe.send({"seconds": result, "peak_mib": peak_mib()})


def peak_mib() -> float:
    """Peak resident set of this process; getrusage would include that of the process it was forked from."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(lines["VmHWM"].split()[0]) / 1024


class FreeFeatures(nn.Module):
    """Stand-in for nnU-Net's network; its 32 features are the image times 32 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Module()
        self.decoder.seg_layers = nn.ModuleList([nn.Conv3d(32, 3, 1)])
        self.decoder.deep_supervision = False
        self.weight = nn.Parameter(torch.linspace(-1, 1, 32))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, *S) -> (N, 3, *S)."""
        logits: Tensor = self.decoder.seg_layers[-1]((self.weight.view(1, -1, 1, 1, 1) * x).abs_())
        return logits


def simulate(kind: str, shape: tuple[int, ...], threads: int) -> float:
    """Time the sliding window over a volume (z, y, x) in seconds; with maps also resampling and writing."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from nnunet_cfcl.chromap.color_space import ColorSpace
    from nnunet_cfcl.chromap.nnunet.predictor import ChromapPredictor
    from nnunet_cfcl.chromap.nnunet.session import ChromapRequest, ChromapSession, Input
    from nnunet_cfcl.chromap.nnunet.spaces import weights_digest

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network = FreeFeatures()
    predictor = (nnUNetPredictor if kind == "stock" else ChromapPredictor)(
        tile_step_size=1.0, device=torch.device("cpu"), allow_tqdm=True, use_mirroring=False)
    predictor.manual_initialization(network, *simulated_plan(shape), "nnUNetTrainer", None)
    predictor.list_of_parameters = [network.state_dict()]
    data = torch.linspace(-2, 2, int(np.prod(shape))).view(1, *shape)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        if kind != "stock":
            sample = torch.linspace(-2, 2, 20000)[:, None]
            features = (network.weight.detach() * sample).abs() + 0.1 * torch.randn(20000, 32)
            space = ColorSpace.fit(features, identity=weights_digest(network.state_dict()))
            space.save(Path(out) / "space.npz")
            session = ChromapSession(predictor, ChromapRequest(space=Path(out) / "space.npz", strict=True), Path(out),
                                     {"volume": Input((), None, None)})
            predictor._session = session
            session.describe("volume", {
                "spacing": [1.0, 1.0, 1.0], "shape_after_cropping_and_before_resampling": shape,
                "shape_before_cropping": shape, "bbox_used_for_cropping": [[0, n] for n in shape]})
            whole = data[0].numpy()
            session.prepare()
            assert session._writer is not None
            session._writer._image = lambda case: whole  # type: ignore[method-assign]
        logits = predictor.predict_logits_from_preprocessed_data(data)
        # next step of nnU-Net's predictor
        logits = logits.cpu().detach().numpy()
        if kind != "stock":
            session.finish()
            print([(file.name, file.stat().st_size // MIB) for file in Path(out).iterdir()])
    return time.perf_counter() - started


def simulated_plan(shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Attributes of a plan that nnU-Net's predictor reads, for windows of 96 x 160 x 160 voxels."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    resampling = {f"resampling_fn_{what}": "resample_data_or_seg_to_shape" for what in ("data", "seg", "probabilities")}
    kwargs = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    architecture = {"network_class_name": "none", "arch_kwargs": {}, "_kw_requires_import": []}
    configuration = {
        "architecture": architecture, "patch_size": [96, 160, 160], "spacing": [1.0, 1.0, 1.0], "batch_size": 2,
        **resampling, **{f"{name}_kwargs": kwargs for name in resampling}}
    plans = PlansManager({
        "plans_name": "simulated", "dataset_name": "Dataset000_Simulated", "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2], "image_reader_writer": "SimpleITKIO", "label_manager": "LabelManager",
        "configurations": {"3d_fullres": configuration}})
    labels = {"background": 0, "organ": 1, "lesion": 2}
    description = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"}
    return plans, plans.get_configuration("3d_fullres"), None, description


def main() -> None:
    """Measure and write."""
    arguments = parse_arguments()
    if arguments.simulate:
        shape = tuple(arguments.simulate[::-1])
        found: dict[str, Any] = {kind: peak_of(simulate, kind, shape, arguments.threads)
                                 for kind in ("stock", "chromap")}
        found["ratio"] = found["chromap"]["peak_mib"] / found["stock"]["peak_mib"]
        write_result(arguments.out, "chromap_memory", {"shape": shape, **found})
        return
    images = [[str(file)] for file in sorted(arguments.i.glob("*_0000.*"))[: arguments.images]]
    seconds: dict[str, list[float]] = {"stock": [], "chromap": []}
    for number in range(arguments.rounds + 1):
        for kind, measured in seconds.items():
            took = predict(kind, arguments, images)
            if number:
                measured.append(took)
    best = {kind: min(measured) for kind, measured in seconds.items()}
    memory = {kind: peak_of(predict, kind, arguments, images) for kind in seconds}
    write_result(arguments.out, arguments.name, {
        "images": len(images), "device": arguments.device, "threads": arguments.threads, "seconds": seconds,
        "ratio": best["chromap"] / best["stock"],
        "peak_mib": {kind: one["peak_mib"] for kind, one in memory.items()},
        "memory_ratio": memory["chromap"]["peak_mib"] / memory["stock"]["peak_mib"]})


if __name__ == "__main__":
    # worker processes of nnU-Net inherit the folder of temporary files
    if shutil.disk_usage(tempfile.gettempdir()).free < 2**30:
        raise SystemExit(f"less than 1 GiB free in {tempfile.gettempdir()}: set TMPDIR")
    main()
