"""What a network costs where this runs: parameters, multiply-adds, bytes on disk, and time."""

import platform
import tempfile
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from coss_hf.hub.export import latency
from coss_hf.models.backbone import Backbone

BATCHES = (1, 64)


def device_name(device: torch.device) -> str:
    """Of the hardware that times were taken on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' * (threads > 1)}"


@torch.inference_mode()
def costs(networks: dict[str, Backbone], device: torch.device, rounds: int = 20) -> dict[str, dict]:
    """Costs of backbones at their own input sizes, pooling included, heads left out.

    Args:
        networks: by name; moved to ``device``.
        rounds: timed runs of each batch size, the networks in turns, of which the median is taken.

    Returns:
        For each: ``parameters``; ``macs``, multiply-adds of one image (matrix products, convolutions and attention);
        ``bytes`` of the weights' files; ``batch_1`` and ``batch_64``, each ``ms`` and ``images_per_second``.
    """
    found, runners = {}, {}
    for name, network in networks.items():
        model = network.model.to(device).eval()
        pixels = torch.randn(max(BATCHES), 3, *network.size, device=device, dtype=next(model.parameters()).dtype)
        # The counter does not see into the CPU's fused attention.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            network.features(pixels[:1])
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        macs = counter.get_total_flops() // 2
        found[name] = {"parameters": network.num_parameters(), "macs": macs, "bytes": size}
        # Copying to the CPU waits for a GPU.
        runners[name] = lambda rows, network=network, pixels=pixels: network.features(
            pixels[: len(rows)]
        ).embedding.cpu()
    for batch in BATCHES:
        for name, times in latency(runners, torch.zeros(1, 1, 1, 1), batch, rounds).items():
            found[name][f"batch_{batch}"] = times
    return found
