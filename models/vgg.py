"""VGG-16 with batch norm for 32x32 images (Simonyan and Zisserman 2015, configuration D)."""

import torch
from torch import Tensor, nn

# Output channels of each 3x3 convolution; "M" is a 2x2 max pooling. Five poolings take 32x32 to 1x1.
CONFIGURATION_D: list[int | str]
CONFIGURATION_D = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]


class vgg16_bn(nn.Module):  # noqa: N801 - the published name of the architecture
    """13 bias-free convolutions and a 512-4096-4096-num_classes head; 34,011,172 parameters at 100 classes.

    Input: float [N, 3, 32, 32]; output: [N, num_classes].
    """

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in CONFIGURATION_D:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(512, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))
