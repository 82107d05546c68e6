"""The state of a network as arrays, which leave a worker and come back: below all rooms, as hooks are."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

NUMPY_FLOATS = (torch.float16, torch.float32, torch.float64)


def arrays_of(model: nn.Module) -> dict[str, np.ndarray]:
    """Return every tensor of a network's state as an array; numpy lacks bfloat16, which becomes float32.

    Extra state that is no tensor is left out: it is the teacher's own, which `load_arrays` keeps.
    """
    tensors = {name: value.detach().cpu() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    wide = {
        name: value.float() if value.is_floating_point() and value.dtype not in NUMPY_FLOATS else value
        for name, value in tensors.items()
    }
    return {name: value.contiguous().numpy() for name, value in wide.items()}


def load_arrays(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Load what `arrays_of` returned into a network of the same form; versions and extra state stay the network's own.

    Raises:
        RuntimeError: a tensor of the network is missing, or there are others.
    """
    state = model.state_dict()
    missing = [name for name, value in state.items() if isinstance(value, Tensor) and name not in arrays]
    if missing:
        raise RuntimeError(f"the state lacks {', '.join(missing[:3])}")
    state.update({name: torch.from_numpy(np.array(value)) for name, value in arrays.items()})
    model.load_state_dict(state)


def own_memory(model: nn.Module) -> None:
    """Give each value of a network that is a view of fewer numbers, such as an expanded one, its own memory."""
    for module in model.modules():
        for values in (module._parameters, module._buffers):
            for name, value in values.items():
                if value is not None and any(
                    stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)
                ):
                    copied = value.detach().contiguous()
                    values[name] = nn.Parameter(copied) if isinstance(value, nn.Parameter) else copied  # type: ignore[assignment]
