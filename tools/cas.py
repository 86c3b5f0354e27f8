"""
Classification accuracy score (CAS) of samples: a classifier learns from them alone and then names real images.

$ python tools/cas.py samples.npz --data cifar10                        # sample.py's
$ python tools/cas.py --data cifar10                                    # of real images: what to hold it against
$ python tools/cas.py --data cifar10 --tokenizer out/tokenizer.pt       # of their reconstructions

It falls where samples of a class are wrong, dull or all alike, which a Frechet distance forgives. Source: Ravuri and
Vinyals, https://arxiv.org/abs/1905.10887, who train a ResNet-56 on 50,000 samples of CIFAR-10. Here it is a network of
eight layers that two CPU cores train in minutes: compare shares of what real images give, not the figures themselves.
"""

import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluate import Array, ImageSet
from fqgan import (
    Parser, UserError, autocast, check, cli, duration, from_uint8, load_tokenizer, load_train_and_held_out, pick_dtype,
    setup_device, shuffled_range, to_uint8)

def conv(c_in, c_out, stride=1):
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))

class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.convs = nn.Sequential(conv(channels, channels), conv(channels, channels))

    def forward(self, x):
        return x + self.convs(x)

def classifier(num_classes, width=32):
    """images (B,3,H,W) in [-1,1] -> logits (B,num_classes)"""
    return nn.Sequential(
        conv(3, width), conv(width, 2 * width, 2), Residual(2 * width),
        conv(2 * width, 4 * width, 2), conv(4 * width, 8 * width, 2), Residual(8 * width),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, num_classes))

def augment(images):
    """Images (B,3,H,W) shifted by up to four pixels, and mirrored half the time, each of them in its own way."""
    B, _, H, W = images.shape
    padded = F.pad(images, (4, 4, 4, 4), mode="reflect")
    shifts = torch.randint(0, 9, (B, 2)).tolist()
    shifted = [image[:, top:top + H, left:left + W] for image, (top, left) in zip(padded, shifts)]
    is_mirrored = torch.rand(B, 1, 1, 1, device=images.device) < 0.5
    images = torch.stack(shifted)
    return torch.where(is_mirrored, images.flip(3), images)

def read_data(data, n=None):
    """An ImageData -> uint8 images (N,3,H,W), labels (N)"""
    images = torch.empty(min(len(data), n or len(data)), 3, data.image_size, data.image_size, dtype=torch.uint8)
    labels = torch.empty(len(images), dtype=torch.long)
    for i, index in enumerate(shuffled_range(len(data))[:len(images)]):
        image, labels[i] = data[index]
        images[i] = to_uint8(image)
    return images, labels

def read_samples(path):
    """An .npz of sample.py -> uint8 images (N,3,H,W), labels (N), class names"""
    try:
        source = ImageSet(path).source
    except UserError as error:
        raise UserError(f"{path} is no file of `sample.py --npz` ({error})") from None
    is_whole = isinstance(source, Array) and source.classes
    check(is_whole, f"{path} is no file of `sample.py --npz`: it names no classes")
    return torch.from_numpy(source.images).permute(0, 3, 1, 2), torch.from_numpy(source.labels).long(), source.classes

def train(images, labels, num_classes, epochs, device):
    """uint8 images (N,3,H,W), labels (N) -> a classifier in eval mode"""
    batch_size = 250
    dtype = pick_dtype("auto", device)
    net = classifier(num_classes).to(device, memory_format=torch.channels_last)
    nn.init.zeros_(net[-1].weight)  # the first loss is ln(num_classes)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps, pct_start=0.2)
    start = time.time()
    for epoch in range(epochs):
        order = torch.randperm(len(images))
        for indices in order[:len(order) // batch_size * batch_size].split(batch_size):
            x = augment(from_uint8(images[indices].to(device)))
            with autocast(device, dtype):
                logits = net(x.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels[indices].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}/{epochs}: loss {loss.item():.3f}, {duration(time.time() - start)}", flush=True)
    return net.eval()

@torch.no_grad()
def accuracy(net, images, labels, device):
    hits = 0
    for x, y in zip(images.split(500), labels.split(500)):
        hits += (net(from_uint8(x.to(device))).argmax(1).cpu() == y).sum().item()
    return hits / len(labels)

def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("samples", metavar="SAMPLES", nargs="?", help="an .npz of sample.py (default: the training images of --data)")
    add("--data", required=True, help="the real images: a folder, cifar10, cifar100 or shapes")
    add("--image-size", type=int, default=32, help="what real images are cropped to (default: %(default)s)")
    add("--tokenizer", metavar="FILE", help="learn from this tokenizer's reconstructions of the training images")
    add("--n", type=int, help="training images (default: all)")
    add("--epochs", type=int, default=10, help="passes over the training images (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of weights, order and augmentation (default: 0)")
    add("--device", default="auto", help="cuda, mps, cpu, ... (default: the best there is)")
    options = parser.parse_args()
    check(not (options.samples and options.tokenizer), "SAMPLES and --tokenizer exclude each other")
    check(options.epochs >= 1 and (options.n is None or options.n >= 1), "--epochs and --n must be at least 1")
    device = setup_device(options.device)
    torch.manual_seed(options.seed % 2**63)

    training, held_out = load_train_and_held_out(options.data, options.image_size)
    if options.samples:
        images, labels, classes = read_samples(options.samples)
        check(classes == training.classes, f"{options.samples} and --data {options.data} have different classes")
        check(images.shape[2] == options.image_size, f"samples have {images.shape[2]} pixels: give --image-size")
        images, labels = images[:options.n], labels[:options.n]
    else:
        images, labels = read_data(training, options.n)
    if options.tokenizer:
        tokenizer = load_tokenizer(options.tokenizer, device)
        parts = [to_uint8(tokenizer.decode(tokenizer.encode(from_uint8(x.to(device))))) for x in images.split(64)]
        images = torch.cat(parts).cpu()
    check(len(images) >= 250, f"{len(images)} training images are too few: at least 250")
    net = train(images, labels, len(training.classes), options.epochs, device)
    held_images, held_labels = read_data(held_out)
    share = accuracy(net, held_images, held_labels, device)
    print(f"cas {share:.4f}: learned from {len(images)} images, {len(held_labels)} held-out images named")

if __name__ == "__main__":
    cli(main)
