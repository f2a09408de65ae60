"""Models of the zoo with random weights that let every channel matter, and inputs that they run on."""

CLASSES = 10  # with 1000, half of what a small network has is the classifier, whose outputs nobody may remove
SIZES = (64, 96, 128, 160, 224, 256, 299)  # a convolutional network is tried at the smallest side that it runs at


def build(library: str, kind: str, family: str, name: str):
    """A model with random weights that let every channel matter, and inputs that it runs on."""
    import torch

    del family
    torch.manual_seed(0)
    if library == "torchvision":
        from tools import torchvision_ops

        torchvision_ops.declare()
        model, side = _torchvision(kind, name)
        sides = (side,) if side else (224,)
    else:
        import timm

        model = timm.create_model(name, num_classes=CLASSES)
        side = model.pretrained_cfg["input_size"][-1]
        sides = (
            (side,) if kind != "cnn" or model.pretrained_cfg.get("fixed_input_size") else (*[s for s in SIZES if s < side], side)
        )
    model.eval()
    for k, own in enumerate(sides):
        inputs = (torch.randn(2, 3, own, own, generator=torch.Generator().manual_seed(0)),)
        try:
            with torch.no_grad():
                model(*inputs)
            break
        except Exception:
            if k == len(sides) - 1:
                raise
    liven(model, inputs)
    return model, inputs


def _torchvision(kind: str, name: str):
    import torch
    import torchvision.models as zoo

    if kind == "segmentation":
        return getattr(zoo.segmentation, name)(weights=None, weights_backbone=None), 96
    if kind == "detection":
        backbone = getattr(zoo.detection, name)(weights=None, weights_backbone=None).backbone
        return backbone, 300 if "ssd300" in name else 128
    if kind == "video":
        model = getattr(zoo.video, name)(weights=None)
        return torch.nn.Sequential(torch.nn.Unflatten(1, (3, 1)), model), 64
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    side = {"inception_v3": 128, "alexnet": 96}.get(name, 64)
    fixed = name.startswith("vit") or name == "maxvit_t"
    return getattr(zoo, name)(weights=None, num_classes=CLASSES, **options), 224 if fixed else side


def liven(model, inputs) -> None:
    """Scales, shifts and zero-initialised weights away from 0 and 1; batch statistics of real activations.

    Many networks start with the last scale of every block at zero: nothing that happens inside would reach
    the outputs, and an oracle that compares outputs would be blind.
    """
    import torch

    generator = torch.Generator().manual_seed(1)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):
                tensor.normal_(0, 0.1, generator=generator)
            elif tensor.dim() <= 1 or bool((tensor == tensor.reshape(-1)[0]).all()):
                tensor.uniform_(0.5, 1.5, generator=generator)
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        try:
            model(*inputs)
        except ValueError:  # a single value per channel: its statistics stay as they were
            pass
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
        model.eval()
        for norm in norms:
            norm.running_var.clamp_(min=1e-2).mul_(torch.empty_like(norm.running_var).uniform_(0.8, 1.2, generator=generator))
