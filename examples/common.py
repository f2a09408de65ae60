"""What the examples share: scenes of scikit-learn's real digits, whose boxes and masks are exact, and a training loop."""

import numpy as np
import torch
from sklearn.datasets import load_digits


def scenes(count: int, size: int = 64, seed: int = 0, most: int = 4):
    """Pictures (count, 1, size, size) in 0..1, masks (count, size, size) of 0 for background and digit + 1, and boxes.

    Boxes are a list of tensors (digits, 5) of class, x1, y1, x2, y2 in pixels.
    """
    generator, digits = np.random.default_rng(seed), load_digits()
    pictures, masks, boxes = np.zeros((count, size, size), np.float32), np.zeros((count, size, size), np.int64), []
    for k in range(count):
        own = []
        for _ in range(generator.integers(1, most + 1)):
            chosen, scale = generator.integers(len(digits.images)), generator.integers(2, 4)
            digit = np.kron(digits.images[chosen] / 16, np.ones((scale, scale)))
            top, left = generator.integers(0, size - len(digit), 2)
            place = np.s_[top : top + len(digit), left : left + len(digit)]
            if masks[k][place].any():
                continue  # digits do not overlap
            pictures[k][place], rows = digit, np.nonzero(digit > 0.2)
            masks[k][place][rows] = digits.target[chosen] + 1
            own.append(
                [
                    digits.target[chosen],
                    left + rows[1].min(),
                    top + rows[0].min(),
                    left + rows[1].max() + 1,
                    top + rows[0].max() + 1,
                ]
            )
        boxes.append(torch.tensor(own, dtype=torch.float32))
    noisy = np.clip(pictures + generator.normal(0, 0.1, pictures.shape), 0, 1).astype(np.float32)
    return torch.from_numpy(noisy)[:, None], torch.from_numpy(masks), boxes


def batches(*tensors, size: int = 32):
    """Tuples of tensors, batch after batch."""
    return list(zip(*(tensor.split(size) for tensor in tensors), strict=True))


def box_batch(pictures, boxes):
    """A batch as Ultralytics' losses read it: boxes are centre, width and height in shares of the picture."""
    index = torch.cat([torch.full((len(own),), float(k)) for k, own in enumerate(boxes)])
    kind, low, high = (torch.cat(boxes) / torch.tensor([1, *[pictures.shape[-1]] * 4])).split((1, 2, 2), 1)
    box = torch.cat([(low + high) / 2, high - low], 1)
    return {"img": pictures.repeat(1, 3, 1, 1), "batch_idx": index, "cls": kind, "bboxes": box}


def box_targets(batch):
    """Boxes x1, y1, x2, y2 in pixels and labels of every picture of such a batch."""
    centre, size = (batch["img"].shape[-1] * batch["bboxes"]).split(2, 1)
    boxes, labels = torch.cat([centre - size / 2, centre + size / 2], 1), batch["cls"][:, 0].long()
    return [{"boxes": boxes[own], "labels": labels[own]} for own in (batch["batch_idx"] == k for k in range(len(batch["img"])))]


def fit(model, data, task, epochs, rate=3e-3):
    """Train a model by its task's loss."""
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * len(data))
    model.train()
    for _ in range(epochs):
        for batch in data:
            inputs = task.inputs(batch)
            optimizer.zero_grad()
            outputs = model(**inputs) if isinstance(inputs, dict) else model(inputs)
            task.loss(outputs, batch).backward()
            optimizer.step()
            schedule.step()
    return model.eval()
