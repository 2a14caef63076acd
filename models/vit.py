"""A small vision transformer for 32x32 images (Dosovitskiy et al., ICLR 2021), in torchvision's implementation."""

from torch import nn


def vit_tiny(num_classes: int = 100) -> nn.Module:
    """6 layers of 3 heads, 192 wide, over 16 patches of 8x8 pixels; 2,729,380 parameters at 100 classes.

    Input: float [N, 3, 32, 32]; output: [N, num_classes]. The head begins at zeros.
    """
    from torchvision.models import VisionTransformer  # slow to import, and no other network here needs it

    return VisionTransformer(
        32, patch_size=8, num_layers=6, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=num_classes
    )
