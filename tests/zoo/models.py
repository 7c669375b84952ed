"""The models of the zoo: how each is built, what it is fed, and which loss of each sample it has.

Weights are drawn, not loaded. Tensors that a library starts at zero (heads, the last scale of a residual branch) get
small numbers, so that no branch is dead. Layers of dropout and stochastic depth are in evaluation mode, for their
random numbers are others in float64; all else is in training mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sgr_kernels as sgr

CLASSES = 10
ANCHORS = 774  # of RetinaNet for 64 x 64 pixels
QUERIES = 12


def _classes(generator: torch.Generator, batch: int) -> Tensor:
    return torch.randint(0, CLASSES, (batch,), generator=generator)


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        name: Library and model.
        build: Makes it, from the global random stream.
        shape: Of a batch.
        loss_fn: One loss a sample.
        labels: Draws what ``loss_fn`` takes beside the outputs, of a batch's size.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (4, 3, 64, 64)
    loss_fn: Callable[[Any, Any], Tensor] = sgr.cross_entropy_per_sample
    labels: Callable[[torch.Generator, int], Any] = _classes

    def model(self) -> nn.Module:
        """A new one, in training mode, float32, always the same."""
        torch.manual_seed(0)
        model = self.build().float().train()
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.05)
        for module in model.modules():
            if any(word in type(module).__name__ for word in ("Drop", "StochasticDepth")):
                module.eval()
        return model

    def batch(self) -> tuple[Tensor, Any]:
        """Images in [0, 1] and labels, always the same."""
        generator = torch.Generator().manual_seed(1)
        return torch.rand(self.shape, generator=generator), self.labels(generator, self.shape[0])


# Losses, one a sample.


def of_logits(outputs: Any, labels: Tensor) -> Tensor:
    """Of a ModelOutput."""
    return sgr.cross_entropy_per_sample(outputs.logits, labels)


def with_auxiliary_heads(outputs: Any, labels: Tensor) -> Tensor:
    """Of a tuple of logits, the main ones first."""
    main, *others = (sgr.cross_entropy_per_sample(logits, labels) for logits in outputs)
    return main + 0.3 * sum(others)


def of_pixels(outputs: Any, labels: Tensor) -> Tensor:
    """Of maps of logits, with torchvision's auxiliary head where there is one."""
    maps = [outputs["out"], outputs.get("aux")] if "out" in outputs else [outputs.logits, None]
    losses = [
        F.cross_entropy(F.interpolate(logits, labels.shape[1:], mode="bilinear"), labels, reduction="none").mean((1, 2))
        for logits in maps
        if logits is not None
    ]
    return losses[0] + 0.5 * sum(losses[1:])


def _masks(generator: torch.Generator, batch: int) -> Tensor:
    return torch.randint(0, CLASSES, (batch, 64, 64), generator=generator)


def of_anchors(outputs: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
    """RetinaNet's: focal loss of all anchors, smooth L1 of the boxes of some."""
    from torchvision.ops import sigmoid_focal_loss

    logits, boxes = outputs["cls_logits"], outputs["bbox_regression"]
    found = labels["classes"].sum(2)
    focal = sigmoid_focal_loss(logits, labels["classes"].to(logits.dtype)).sum((1, 2))
    smooth = (F.smooth_l1_loss(boxes, labels["boxes"].to(boxes.dtype), reduction="none").sum(2) * found).sum(1)
    return (focal + smooth) / found.sum(1)


def _anchors(generator: torch.Generator, batch: int) -> dict[str, Tensor]:
    hits = torch.rand(batch, ANCHORS, generator=generator) < 0.02
    classes = F.one_hot(torch.randint(0, CLASSES, (batch, ANCHORS), generator=generator), CLASSES) * hits[..., None]
    return {"classes": classes, "boxes": torch.randn(batch, ANCHORS, 4, generator=generator)}


def of_queries(outputs: Any, labels: Mapping[str, Tensor]) -> Tensor:
    """Of classes and boxes of detection tokens, each with its own target."""
    classes = F.cross_entropy(outputs.logits.mT, labels["classes"], reduction="none").mean(1)
    return classes + (outputs.pred_boxes - labels["boxes"].to(outputs.pred_boxes.dtype)).square().sum(2).mean(1)


def _queries(generator: torch.Generator, batch: int) -> dict[str, Tensor]:
    classes = torch.randint(0, CLASSES, (batch, QUERIES), generator=generator)
    return {"classes": classes, "boxes": torch.rand(batch, QUERIES, 4, generator=generator)}


# Models of other inputs, and parts of models.


class Anchors(nn.Module):
    """A detector up to what its losses are of."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Class logits and box offsets of all anchors."""
        return self.head(list(self.backbone(x).values()))


class Frames(nn.Module):
    """A video model on frames that lie in the channels, (B, 3 T, H, W): Sigma then also knows pairs of frames."""

    def __init__(self, model: nn.Module, frames_first: bool = False) -> None:
        super().__init__()
        self.model, self.frames_first = model, frames_first

    def forward(self, x: Tensor) -> Any:
        """(B, 3, T, H, W) or (B, T, 3, H, W)."""
        video = x.unflatten(1, (3, -1))
        return self.model(video.transpose(1, 2) if self.frames_first else video)


class Waveform(nn.Module):
    """A model of signals (B, L), on one channel."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        """Of (B, 1, L)."""
        return self.model(x[:, 0])


def _waveform(model: nn.Module) -> nn.Module:
    # Its encoder would set requires_grad on its input, for checkpoints, which fails where the input has a graph.
    model.wav2vec2.feature_extractor._requires_grad = False
    return Waveform(model)


class Spectrogram(nn.Module):
    """A model of spectrograms (B, T, F), on one channel."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        """Of (B, 1, T, F)."""
        return self.model(x[:, 0])


def m5(width: int = 32) -> nn.Module:
    """M5 for waveforms (Dai, Dai, Qu, Li, Das 2017)."""
    layers: list[nn.Module] = []
    for inputs, outputs, kernel, stride in ((1, 1, 80, 4), (1, 1, 3, 1), (1, 2, 3, 1), (2, 4, 3, 1)):
        first = 1 if not layers else inputs * width
        layers += [nn.Conv1d(first, outputs * width, kernel, stride), nn.BatchNorm1d(outputs * width)]
        layers += [nn.ReLU(), nn.MaxPool1d(4)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4 * width, CLASSES))


# The list.


def _timm(name: str, shape: tuple[int, ...] = (4, 3, 64, 64), **options: Any) -> Entry:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)

    return Entry(f"timm/{name}", build, shape)


def _distilled(name: str, **options: Any) -> Entry:
    """With a head for the teacher's labels, both in the loss."""
    plain = _timm(name, **options)

    def build() -> nn.Module:
        model = plain.build()
        model.set_distilled_training(True)
        return model

    return Entry(plain.name, build, loss_fn=with_auxiliary_heads)


def _torchvision(name: str, shape: tuple[int, ...] = (4, 3, 64, 64), **options: Any) -> Entry:
    def build() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)

    return Entry(f"torchvision/{name}", build, shape)


def _segmenter(name: str, shape: tuple[int, ...] = (2, 3, 64, 64), **options: Any) -> Entry:
    plain = _torchvision(name, shape, weights_backbone=None, **options)
    return Entry(plain.name, plain.build, shape, of_pixels, _masks)


def _auxiliary(name: str, shape: tuple[int, ...] = (4, 3, 64, 64)) -> Entry:
    plain = _torchvision(name, shape, init_weights=False, aux_logits=True)
    return Entry(plain.name, plain.build, shape, with_auxiliary_heads)


def _transformers(
    name: str,
    config: str,
    shape: tuple[int, ...] = (4, 3, 32, 32),
    loss_fn: Callable[[Any, Any], Tensor] = of_logits,
    labels: Callable[[torch.Generator, int], Any] = _classes,
    note: str = "",
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    **options: Any,
) -> Entry:
    def build() -> nn.Module:
        import transformers

        settings = getattr(transformers, config)(num_labels=CLASSES, **options)
        return wrap(getattr(transformers, name)(settings))

    return Entry(f"transformers/{name}{note}", build, shape, loss_fn, labels)


_SMALL = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 192}
_VIT = {**_SMALL, "image_size": 32, "patch_size": 4}

_TIMM = [
    *(_timm(name) for name in ("resnet18", "resnet50", "resnext50_32x4d", "densenet121", "regnety_004", "dla34")),
    *(_timm(name) for name in ("skresnet18", "resnest14d", "gcresnet33ts", "lambda_resnet26t", "nf_resnet26")),
    *(_timm(name) for name in ("resnetv2_50", "tresnet_m", "hrnet_w18_small", "selecsls42b", "repvit_m0_9")),
    *(_timm(name) for name in ("efficientnet_b0", "tf_efficientnetv2_b0", "test_efficientnet_evos", "ghostnet_100")),
    *(_timm(name) for name in ("mobilenetv3_small_100", "mobilenetv4_conv_small", "mobilevit_xxs", "mobilevitv2_050")),
    _timm("efficientvit_b0"),
    *(_timm(name) for name in ("convnext_tiny", "convnextv2_atto", "inception_next_atto", "mambaout_femto")),
    *(_timm(name) for name in ("edgenext_xx_small", "fastvit_t8", "poolformer_s12", "focalnet_tiny_srf")),
    *(_timm(name, img_size=64) for name in ("vit_tiny_patch16_224", "deit3_small_patch16_224", "cait_xxs24_224")),
    *(
        _timm(name, img_size=64)
        for name in ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "mixer_s32_224")
    ),
    *(_timm(name, img_size=64) for name in ("coatnet_nano_rw_224", "maxvit_pico_rw_256", "vit_small_patch16_dinov3")),
    *(_timm(name, img_size=64) for name in ("volo_d1_224", "gmlp_s16_224", "resmlp_12_224", "twins_svt_small")),
    *(_timm(name, (4, 3, 56, 56), img_size=56) for name in ("eva02_tiny_patch14_224", "sequencer2d_s")),
    *(_timm(name) for name in ("xcit_nano_12_p16_224", "pvt_v2_b0", "davit_tiny")),
    _timm("halonet26t", (2, 3, 256, 256)),
    _timm("hiera_tiny_224", (2, 3, 224, 224)),
    _distilled("deit_tiny_distilled_patch16_224", img_size=64),
    _distilled("levit_128s", img_size=64),
]
_TORCHVISION = [
    *(_torchvision(name) for name in ("alexnet", "squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5")),
    *(_torchvision(name) for name in ("mobilenet_v3_small", "efficientnet_b0", "swin_v2_t")),
    Entry("torchvision/VisionTransformer", lambda: _vision_transformer()),
    _auxiliary("googlenet"),
    _auxiliary("inception_v3", (2, 3, 299, 299)),
    _segmenter("fcn_resnet50", aux_loss=True),
    *map(_segmenter, ("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")),
    Entry("torchvision/retinanet_resnet50_fpn", lambda: _retinanet(), (4, 3, 64, 64), of_anchors, _anchors),
    Entry("torchvision/r3d_18 (video)", lambda: _video(), (2, 12, 32, 32)),
]
_TRANSFORMERS = [
    _transformers("ViTForImageClassification", "ViTConfig", **_VIT),
    _transformers("ViTForImageClassification", "ViTConfig", note=" (eager)", attn_implementation="eager", **_VIT),
    _transformers("BeitForImageClassification", "BeitConfig", **_VIT),
    _transformers("Dinov2ForImageClassification", "Dinov2Config", (4, 3, 28, 28), **{**_SMALL, "image_size": 28}),
    _transformers(
        "SwinForImageClassification", "SwinConfig", (4, 3, 64, 64), image_size=64, embed_dim=48, window_size=2
    ),
    _transformers("Swinv2ForImageClassification", "Swinv2Config", (4, 3, 64, 64), image_size=64, embed_dim=48),
    _transformers("ResNetForImageClassification", "ResNetConfig", (4, 3, 64, 64)),
    _transformers("ConvNextForImageClassification", "ConvNextConfig", (4, 3, 64, 64)),
    _transformers("MobileViTForImageClassification", "MobileViTConfig", (4, 3, 64, 64), image_size=64),
    _transformers(
        "SegformerForSemanticSegmentation", "SegformerConfig", (2, 3, 64, 64), of_pixels, _masks, image_size=64
    ),
    _transformers(
        *("YolosForObjectDetection", "YolosConfig", (4, 3, 64, 64), of_queries, _queries),
        **{**_SMALL, "image_size": (64, 64), "num_detection_tokens": QUERIES},
    ),
    _transformers(
        *("VideoMAEForVideoClassification", "VideoMAEConfig", (2, 12, 32, 32)),
        **{**_VIT, "num_frames": 4},
        note=" (video)",
        wrap=lambda model: Frames(model, frames_first=True),
    ),
    _transformers(
        *("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", (4, 1, 4000)),
        **_SMALL,
        note=" (audio)",
        wrap=_waveform,
        **dict.fromkeys(("attention_dropout", "layerdrop"), 0.0),
        conv_dim=(64,) * 7,
        mask_time_length=2,
        classifier_proj_size=32,
    ),
    _transformers(
        *("ASTForAudioClassification", "ASTConfig", (4, 1, 64, 32)),
        **{**_SMALL, "patch_size": 8, "max_length": 64, "num_mel_bins": 32},
        note=" (audio)",
        wrap=Spectrogram,
    ),
]


def _vision_transformer() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(64, 8, num_layers=4, num_heads=4, hidden_dim=96, mlp_dim=192, num_classes=CLASSES)


def _retinanet() -> nn.Module:
    from torchvision.models.detection import retinanet_resnet50_fpn

    return Anchors(retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=CLASSES))


def _video() -> nn.Module:
    from torchvision.models.video import r3d_18

    return Frames(r3d_18(weights=None, num_classes=CLASSES))


ENTRIES = {
    entry.name: entry for entry in (*_TIMM, *_TORCHVISION, *_TRANSFORMERS, Entry("M5 (audio)", m5, (4, 1, 4000)))
}
