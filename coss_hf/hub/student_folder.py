"""The folder of a student: its network, its image processor, its head, and what sentence-transformers reads."""

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from coss_hf.hub.sentence_modules import write_modules
from coss_hf.models.backbone import Backbone
from coss_hf.models.heads import HEAD_FILE
from coss_hf.models.saving import save_network, save_processor


def write_student(
    folder: str | Path,
    student: Backbone,
    head: nn.Module | None,
    *,
    network_state: dict[str, Tensor] | None = None,
    head_state: dict[str, Tensor] | None = None,
) -> None:
    """Write a student with its image processor and its head; what another student left there is replaced.

    Args:
        folder: the folder, which exists.
        student: the network with its pooling and pre-processing.
        head: the projection head, or None.
        network_state: state dict of the network, instead of its own.
        head_state: state dict of the head, instead of its own.
    """
    save_network(student, folder, network_state)
    save_processor(student.processor, folder)
    write_modules(folder, student, head, head_state)
    if head_state is None:
        head_state = {} if head is None else head.state_dict()
    write_tensors(Path(folder, HEAD_FILE), head_state)


def write_tensors(path: Path, state: dict[str, Tensor]) -> None:
    """Write a state dict as safetensors; where it is empty, remove the file of another student."""
    path.unlink(missing_ok=True)
    if state:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, path, metadata={"format": "pt"})
