"""What a network costs on this machine: parameters, multiply-adds, bytes on disk, and time."""

import platform
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from coss_hf.hub.export import latency
from coss_hf.models.backbone import Backbone

BATCHES = (1, 64)


def device_name(device: torch.device) -> str:
    """Return the name of the hardware that times were taken on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} {'thread' if threads == 1 else 'threads'}"


@torch.inference_mode()
def costs(networks: dict[str, Backbone], device: torch.device, rounds: int = 20) -> dict[str, dict]:
    """Measure backbones at their own input sizes, with pooling, without heads.

    Args:
        networks: the networks by name; moved to ``device``.
        device: where times are taken.
        rounds: number of timed runs of each batch size, the networks in turns, of which the median is taken.

    Returns:
        For each: ``parameters``; ``macs``, multiply-adds of one image (matrix products, convolutions and attention);
        ``bytes`` of the weights' files; ``batch_1`` and ``batch_64``, each ``ms`` and ``images_per_second``.
    """
    found = {}
    runners = {}
    for name, network in networks.items():
        model = network.model.to(device).eval()
        pixels = torch.randn(max(BATCHES), 3, *network.size, device=device, dtype=next(model.parameters()).dtype)
        found[name] = {
            "parameters": network.num_parameters(),
            "macs": _multiply_adds(network, pixels[:1]),
            "bytes": _file_bytes(network),
        }
        runners[name] = _runner(network, pixels)
    for batch in BATCHES:
        for name, times in latency(runners, torch.zeros(1, 1, 1, 1), batch, rounds).items():
            found[name][f"batch_{batch}"] = times
    return found


def _multiply_adds(network: Backbone, pixels: Tensor) -> int:
    # The counter does not see into the CPU's fused attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network.features(pixels)
    return counter.get_total_flops() // 2


def _file_bytes(network: Backbone) -> int:
    if not hasattr(network.model, "save_pretrained"):  # a plain module, or a tower with its projection
        return sum(value.nbytes for value in network.model.state_dict().values())
    with tempfile.TemporaryDirectory() as folder:
        network.model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def _runner(network: Backbone, pixels: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that embeds as many of ``pixels`` as it is given rows."""

    def run(rows: Tensor) -> Tensor:
        # Copying to the CPU waits for a GPU.
        return network.features(pixels[: len(rows)]).embedding.cpu()

    return run


def cost_table(found: dict[str, dict]) -> list[list[str]]:
    """Return what ``costs`` found as a table: the header, then one line for each network."""
    header = ["", "parameters", "multiply-adds", "bytes"]
    for batch in BATCHES:
        header += [f"ms, batch {batch}", f"images/s, batch {batch}"]
    lines = [header]
    for name, network in found.items():
        line = [name, f"{network['parameters']:,}", f"{network['macs']:,}", f"{network['bytes']:,}"]
        for batch in BATCHES:
            times = network[f"batch_{batch}"]
            line += [f"{times['ms']:,.2f}", f"{times['images_per_second']:,.0f}"]
        lines.append(line)
    return lines
