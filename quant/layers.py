"""Which parameters the method touches, and at how many bits: the one rule that training and evaluation share."""

from torch import nn

from .grid import check_bits

WEIGHT_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
FIRST_LAST_BITS = 8  # of the first and the last layer when the others have fewer than 4


def layer_bits(model: nn.Module, bits: int, first_last: bool = True) -> dict[str, int]:
    """Bit-width of every quantized parameter, by its state_dict name, in the order of the model's modules.

    These are the weights of convolutions and linear layers, and the biases of linear layers; normalisation layers,
    embeddings and convolution biases stay float. The first and the last of those layers get `bits` bits if bits >= 4,
    else 8; with first_last=False they are left out (published rule). A parameter that several layers share appears
    once, under its first name.

    Raises ValueError for bits outside 2..8 and for a model with no such layer.
    """
    check_bits(bits)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, WEIGHT_LAYERS)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no convolution or linear layer to quantize")
    ends = (layers[0][1], layers[-1][1])
    result: dict[str, int] = {}
    seen: set[int] = set()
    for name, module in layers:
        at_end = module in ends
        if at_end and not first_last:
            continue
        for key, parameter in module.named_parameters(name, recurse=False):
            if id(parameter) in seen or (key.endswith("bias") and not isinstance(module, nn.Linear)):
                continue
            seen.add(id(parameter))
            result[key] = FIRST_LAST_BITS if at_end and bits < 4 else bits
    return result
