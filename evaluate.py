"""
Measures a tokenizer, or two sets of images.

$ python evaluate.py                                          # out/tokenizer.pt on its held-out images
$ python evaluate.py --real photos/ --fake samples.npz        # folders of images, or .npz files such as sample.py's
$ python evaluate.py --data cifar10 --fake samples.npz        # against its held-out images
$ python evaluate.py --features teachers/dinov2_vitb14.pt2    # another network in place of FID's
$ torchrun --nproc-per-node=8 evaluate.py --json metrics.json # the same metrics, sooner

The protocol is that of ADM's evaluator: Dhariwal and Nichol, https://arxiv.org/abs/2105.05233.
"""

import hashlib
import json
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torchvision.models import inception_v3

from fqgan import (
    batches_of_this_rank, build_model, cached_download, check, cli, code_usage, Folder, FQGAN, FQGANConfig,
    from_uint8, ImageData, load_checkpoint, load_data, load_teacher, load_train_and_held_out, load_weights, LPIPS,
    on_any_rank, one_line, Parser, print0, psnr, rank, reconstruction_rows, refuse_output_inside_data, save_grid,
    setup_device, shuffled_range, to_uint8, UserError, warn_if_unwritable, world_size)

# -----------------------------------------------------------------------------
# Metrics

def ssim(images, others):
    """Images (B,3,H,W) in [-1,1] twice -> (B,), in 8 bits. Source: Wang et al. 2004; scikit-image's defaults."""
    check(min(images.shape[2:]) >= 7, "images are smaller than SSIM's 7x7 windows")
    window_mean = partial(F.avg_pool2d, kernel_size=7, stride=1)
    x = to_uint8(images).float() / 255
    y = to_uint8(others).float() / 255
    mean_x = window_mean(x)
    mean_y = window_mean(y)
    unbiased = 49 / 48  # a window's 49 pixels
    var_x = unbiased * (window_mean(x * x) - mean_x**2)
    var_y = unbiased * (window_mean(y * y) - mean_y**2)
    cov = unbiased * (window_mean(x * y) - mean_x * mean_y)
    numerator = (2 * mean_x * mean_y + 0.01**2) * (2 * cov + 0.03**2)
    denominator = (mean_x**2 + mean_y**2 + 0.01**2) * (var_x + var_y + 0.03**2)
    return (numerator / denominator).mean((1, 2, 3))

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """
    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two Gaussians: float64 arrays (D), (D,D) each. Source: Heusel et
    al., https://arxiv.org/abs/1706.08500. With S1 = A A^T the matrix A^T S2 A is symmetric and has the eigenvalues of
    S1 S2: so tr((S1 S2)^(1/2)) is the sum of their roots.
    """
    arrays = [np.asarray(array, np.float64) for array in (mu1, sigma1, mu2, sigma2)]
    shapes = [array.shape for array in arrays]
    check(shapes[:2] == shapes[2:] and shapes[1] == shapes[0] * 2,  # (D, D) for (D,)
          f"statistics of different shapes: {shapes}")
    finite = [np.isfinite(array).all() for array in arrays]
    check(all(finite), "statistics are not finite")
    mu1, sigma1, mu2, sigma2 = arrays
    values, vectors = scipy.linalg.eigh(sigma1)
    root = vectors * np.sqrt(values.clip(0))
    eigenvalues = scipy.linalg.eigvalsh(root.T @ sigma2 @ root)
    root_trace = np.sqrt(eigenvalues.clip(0)).sum()
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root_trace
    return max(0.0, float(distance))  # rounding may take it below

def inception_score(logits, split_size=5000):
    """logits (N, classes) -> (mean, deviation) over consecutive splits of exp(mean KL(p(y|x) || p(y)))"""
    scores = []
    for split in torch.as_tensor(logits).double().split(split_size):
        log_p = split.log_softmax(1)
        log_marginal = log_p.logsumexp(0) - math.log(len(split))
        divergence = (log_p.exp() * (log_p - log_marginal)).sum(1)
        scores.append(divergence.mean().exp())
    scores = torch.stack(scores)
    return float(scores.mean()), float(scores.std(correction=0))

def precision_recall(real, fake, k=3):
    """
    Features (N,D), (M,D) -> (precision: share of the fake ones that lie among the real; recall: the reverse).
    Source: Kynkaanniemi et al., https://arxiv.org/abs/1904.06991.
    """
    real, fake = [torch.as_tensor(features).double() for features in (real, fake)]
    check(min(len(real), len(fake)) > k, f"precision and recall need more than {k} images in both sets")

    def square_distances(points, others):
        squares = points.square().sum(1)[:, None] + others.square().sum(1)
        return (squares - 2 * points @ others.T).clamp(min=0)

    def knn_radius(points):  # the nearest neighbor, not counted, is the point itself
        radii = [square_distances(part, points).kthvalue(k + 1).values for part in points.split(1024)]
        return torch.cat(radii)

    def coverage(points, others):  # share of points within the radius of one of the others at least
        square_radius = knn_radius(others)
        inside = [(square_distances(part, others) <= square_radius).any(1) for part in points.split(1024)]
        return torch.cat(inside).double().mean().item()

    return coverage(fake, real), coverage(real, fake)

def mutual_information(a, b):
    """The bits that two integer arrays (n) share; biased upwards unless n is far above the number of pairs."""
    def entropy(values):
        _, counts = np.unique(values, return_counts=True)
        p = counts / len(values)
        return float(-(p * np.log2(p)).sum())

    a = a.astype(np.int64)
    b = b.astype(np.int64)
    pairs = a * (int(b.max()) + 1) + b
    return entropy(a) + entropy(b) - entropy(pairs)

def linear_probe(x, labels, held_x, held_labels):
    """
    Features (n,D), labels (n), and held-out ones -> share of the held-out labels that a linear classifier gets right:
    least squares onto one-hot labels, with a ridge of a hundredth of the features' mean variance.
    """
    num_classes = int(max(labels.max(), held_labels.max())) + 1
    targets = F.one_hot(labels, num_classes).double()
    mean = x.mean(0)
    x = (x - mean).double()
    gram = x.T @ x
    gram.diagonal().add_(0.01 * gram.trace() / len(gram) + 1e-9)
    correlation = x.T @ (targets - targets.mean(0))
    weight = scipy.linalg.solve(gram.numpy(), correlation.numpy(), assume_a="pos")
    hits = 0
    for features, label in zip(held_x.split(1024), held_labels.split(1024)):  # many features take much memory
        scores = (features - mean).double() @ torch.from_numpy(weight) + targets.mean(0)
        hits += (scores.argmax(1) == label).sum().item()
    return hits / len(held_labels)

# -----------------------------------------------------------------------------
# Networks: images uint8 (B,3,H,W) -> (features (B,D), logits (B,C))

def tf1_resize(x, size=299):
    """Bilinear as in TensorFlow 1, (B,3,H,W) -> (B,3,size,size): pixel i lies at i * side / size."""
    for dim in (3, 2):
        side = x.shape[dim]
        scale = np.float32(side) / np.float32(size)
        position = torch.arange(size, dtype=torch.float32, device=x.device) * scale.item()
        low = position.long().clamp(max=side - 1)
        a = x.index_select(dim, low)
        b = x.index_select(dim, (low + 1).clamp(max=side - 1))
        weight = position - low
        x = a + (b - a) * (weight if dim == 3 else weight[:, None])
    return x

def forward_with_pool(block, pool, x):
    """torchvision's Inception block, but with `pool` in its last branch."""
    branches = block._forward(x)
    branches[-1] = block.branch_pool(pool(x))
    return torch.cat(branches, 1)

INCEPTION_DIGEST = "6726825d"  # the beginning of its file's SHA-256

class Inception(nn.Module):
    """
    The FID network: the 2015-12-05 Inception graph. Its 1008 logits are without the final bias. It is torchvision's
    Inception v3, but blocks average without counting the padding, and the last one takes maxima.
    """

    url = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"

    def __init__(self, weights=None):
        super().__init__()
        self.net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
        load_weights(self.net, cached_download(self.url, INCEPTION_DIGEST, local=weights))
        average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
        maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
        for name, block in self.net.named_children():
            if hasattr(block, "branch_pool"):
                pool = maximum if name == "Mixed_7c" else average
                block.forward = partial(forward_with_pool, block, pool)
        self.fc_weight = self.net.fc.weight
        self.net.fc = nn.Identity()
        self.eval().requires_grad_(False)

    def forward(self, images):
        features = self.net((tf1_resize(images.float()) - 128) / 128)
        return features, F.linear(features, self.fc_weight)

class Network:
    """
    The FID network, or the one of --features, which has no logits: images uint8 (B,3,H,W) -> (features (B,D), logits
    (B,C)). Two of the same `digest` are the same. Raises UserError where the weights cannot be had.
    """

    def __init__(self, options):
        self.is_inception = not options.features
        if self.is_inception:
            path = cached_download(Inception.url, INCEPTION_DIGEST, local=options.inception)
            self.module = Inception(path).to(options.device)
        else:
            path = options.features
            self.module = load_teacher(path).to(options.device)
        with open(path, "rb") as file:
            self.digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]

    def __call__(self, images):
        if self.is_inception:
            return self.module(images)
        try:
            features = self.module(from_uint8(images)).float()
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, AttributeError, RuntimeError) as error:
            raise UserError(f"--features fails on images {tuple(images.shape)} ({one_line(error)})") from None
        check(features.ndim == 2, f"--features gives {tuple(features.shape)} in place of (B, D)")
        return features, features[:, :0]

def loaded(make, is_asked_for, device):
    """-> (what make() gives, ""), or on all ranks (None, why it cannot be had); an error if the user asked for it"""
    made = None
    reason = "another process cannot have it"
    try:
        made = make()
    except UserError as error:
        if is_asked_for:
            raise
        reason = str(error)
    if on_any_rank(made is None, device):
        return None, reason
    return made, ""

def load_network(options):
    return loaded(lambda: Network(options), options.features or options.inception, options.device)

# -----------------------------------------------------------------------------
# Sets of images

class Array:
    """(PIL image, label) of an .npz file: arr_0, uint8 (N,H,W,3), as ADM's; labels and classes, as sample.py's."""

    def __init__(self, path, arrays):
        self.images = arrays["arr_0"]
        check(self.images.dtype == np.uint8 and self.images.ndim == 4 and self.images.shape[3] == 3,
              f"{path}: arr_0 is {self.images.dtype} {self.images.shape}; expected uint8 (N, height, width, 3)")
        self.labels = arrays.get("labels", np.zeros(len(self.images), np.int64))
        check(self.labels.shape == self.images.shape[:1] and self.labels.dtype.kind in "iu" and self.labels.min() >= 0,
              f"{path}: labels do not fit arr_0: they are {self.labels.dtype} {self.labels.shape}")
        self.classes = None
        if "labels" in arrays:
            self.classes = arrays.get("classes", np.zeros(0)).tolist()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return Image.fromarray(self.images[index]), self.labels[index]

class ImageSet:
    """
    A folder of images or an .npz file. `source` gives (PIL image, label), or is None; `saved` are the statistics of an
    .npz, ADM's or those of --save-stats, or empty: mu, sigma, perhaps the network's digest and the images' size. A file
    of both, as ADM's, has statistics of the FID network: with --features its images are used alone.
    """

    def __init__(self, path, features=None):
        self.path = path
        self.source = None
        self.saved = {}
        if os.path.isdir(path):
            self.source = Folder(path)
            if len(self.source.classes) == 1:  # a flat folder: its images have no labels
                self.source.classes = None
            return
        try:
            with np.load(path) as file:
                arrays = dict(file)
        except Exception as error:
            raise UserError(f"{path} is neither a folder nor an .npz file ({one_line(error)})") from None
        if arrays.get("arr_0", np.zeros(0)).size:
            self.source = Array(path, arrays)
        if {"mu", "sigma"} <= arrays.keys() and not (self.source and features):
            names = ("mu", "sigma", "network", "image_size")
            self.saved = {name: arrays[name] for name in names if name in arrays}
        check(self.source or self.saved, f"{path} holds {list(arrays)}; expected arr_0, or mu and sigma")

    def sizes(self):
        """The shorter sides of its images, as far as they are known."""
        if self.source is None:
            return {int(self.saved["image_size"])} if "image_size" in self.saved else set()
        if isinstance(self.source, Array):
            return {min(self.source.images.shape[1:3])}
        sizes = set()
        for path, _ in self.source.samples:
            with suppress(OSError), Image.open(path) as image:  # ImageData will name those that cannot be read
                sizes.add(min(image.size))
        return sizes

def image_size(sets, options):
    """What the images of all sets are cropped to: --image-size, or the size that they have; 0 if none is known."""
    if options.image_size:
        return options.image_size
    smallest = []
    for each in sets:
        sizes = sorted(each.sizes())
        smallest += sizes[:1]
        check(len(sizes) <= 1, f"the shorter sides of the images of {each.path} differ "
              f"({', '.join(map(str, sizes[:5]))}): say with --image-size what to crop to")
    return min(smallest, default=0)

def batches_of(data, indices, options):
    """Yields this rank's batches of an ImageData: (images uint8 (B,3,H,W), labels)."""
    with ThreadPool(min(8, os.cpu_count())) as pool:
        for batch in batches_of_this_rank(len(indices), options.batch_size):
            images, labels = zip(*pool.map(data.__getitem__, [indices[i] for i in batch]))
            images = to_uint8(torch.stack(images))  # 8 bits, as networks take them
            yield images.to(options.device), torch.tensor(labels)

def collect(batches, what):
    """This rank's batches (x, y, ...) -> [x, y, ...] of all ranks, whole and in order, on every rank"""
    parts = []
    for batch in batches:
        parts.append([column.cpu() for column in batch])
        if len(parts) % 100 == 0:
            print0(f"{what}: batch {len(parts)}")
    ranks = [parts]
    if world_size() > 1:
        ranks = [None] * world_size()
        dist.all_gather_object(ranks, parts)
    num_batches = sum(len(parts) for parts in ranks)
    parts = [ranks[i % len(ranks)][i // len(ranks)] for i in range(num_batches)]  # batch i was rank i % world_size()'s
    return [torch.cat(column) for column in zip(*parts)]

@dataclass
class Statistics:
    """A set of images as a network sees it. Of a file of statistics there is no more than mean and covariance."""

    description: str
    mu: np.ndarray  # (D)
    sigma: np.ndarray  # (D, D)
    features: torch.Tensor | None = None  # (N, D)
    logits: torch.Tensor | None = None  # (N, C)
    labels: torch.Tensor | None = None  # (N)
    classes: list | None = None  # their names; empty where they have none; None where the images have no labels

def statistics_of_features(description, features, logits, labels, classes):
    check(len(features) > 3, f"{description}: fewer than 4 images")
    double = features.double()
    return Statistics(description, double.mean(0).numpy(), double.T.cov().numpy(), features, logits, labels, classes)

def statistics_of_data(data, network, options, n=None):
    """Of all images of an ImageData, or of n random ones."""
    indices = shuffled_range(len(data))[:n] if n else range(len(data))
    rows = ((*network(images), labels) for images, labels in batches_of(data, indices, options))
    description = f"{len(indices)} of {data.description}" if n else data.description
    return statistics_of_features(description, *collect(rows, description), data.classes)

def statistics_of_set(each, network, size, options):
    """Of an ImageSet, whose images are cropped to `size`."""
    if each.source is None:
        return Statistics("statistics", each.saved["mu"], each.saved["sigma"])
    data = ImageData(each.source, size, f"{each.path}, cropped to {size}")
    statistics = statistics_of_data(data, network, options)
    if each.saved and each.sizes() == {size}:  # they are of uncropped images
        statistics.mu, statistics.sigma = each.saved["mu"], each.saved["sigma"]
        statistics.description += ", with its own mu and sigma"
    return statistics

# -----------------------------------------------------------------------------
# What is measured: figures by name, and the reasons for those that are None

ROUNDING = "8 bits as int(127.5 x + 128)"

def compare(real, fake, network, device, probe=None):
    """Two Statistics -> figures, reasons. probe: features, labels to fit a classifier to; else half of the real ones"""
    figures = {}
    reasons = {}
    distance = frechet_distance(real.mu, real.sigma, fake.mu, fake.sigma)
    if network.is_inception:
        figures["fid"] = distance
        if fake.logits is not None:
            # splits of images in a random order, which is always the same; what fills no split is left out
            logits = fake.logits[shuffled_range(len(fake.logits))]
            logits = logits[:len(logits) // 5000 * 5000 or len(logits)]
            figures["inception_score"], figures["inception_score_deviation"] = inception_score(logits)
    else:
        figures["fd"] = distance
        figures["named"], figures["named_real"], reason = named(real, fake, probe)
        if reason:
            reasons = {"named": reason, "named_real": reason}
    if real.features is not None and fake.features is not None:
        device = device if device.type == "cuda" else "cpu"  # mps has no float64
        figures["precision"], figures["recall"] = precision_recall(real.features.to(device), fake.features.to(device))
    return figures, reasons

def named(real, fake, probe=None):
    """The shares of fake and of real images whose class a linear classifier of real ones gets right, or a reason."""
    if real.classes is None or fake.classes is None or real.labels.max() == 0:
        return None, None, "a set has no labels, or all the same, or there are no training images"
    if real.classes and fake.classes and real.classes != fake.classes:
        return None, None, f"the classes differ: {', '.join(fake.classes[:5])}; {', '.join(real.classes[:5])}"
    order = shuffled_range(len(real.features))
    if probe is None:
        half, order = order[:len(order) // 2], order[len(order) // 2:]
        probe = real.features[half], real.labels[half]
    share = linear_probe(*probe, fake.features, fake.labels)
    return share, linear_probe(*probe, real.features[order], real.labels[order]), ""

def protocol_of(real, fake, options):
    """All that the figures of two sets depend on, in a line."""
    name = Path(options.features).name if options.features else "Inception 2015-12-05, TensorFlow 1's resize"
    text = f"{name}; {fake.description}; against {real.description}; ADM's resize and center crop"
    if fake.logits is not None and not options.features:
        text += "; Inception Score of 5000 at a time in random order, the rest left out"
    if real.classes is not None and fake.classes is not None:
        num_classes = 1 + int(max(real.labels.max(), fake.labels.max()))
        shares = [labels.bincount(minlength=num_classes) / len(labels) for labels in (real.labels, fake.labels)]
        difference = (shares[0] - shares[1]).abs()
        if difference.max() > 0.01 or difference.sum() > 0.15:  # 50,000 labels drawn from 1,000 have a sum of 0.11
            text += "; their classes are not equally frequent"
    return text

def evaluate_sets(options):
    """--fake against --real, or the held-out part of --data -> figures, reasons, protocol"""
    sets = [ImageSet(path, options.features) for path in (options.real, options.fake) if path]
    check(not options.save_stats or options.data or sets[0].source, "--save-stats is for images, and --real has none")
    size = image_size(sets, options)
    for each in sets:
        check(each.source or each.sizes() <= {size},
              f"{each.path} holds statistics of images of another size than {size}")
        if each.saved and "network" not in each.saved:
            print0(f"{each.path} does not say of which network its statistics are: the other set's is assumed")
    saved_networks = {each.saved["network"].item() for each in sets if "network" in each.saved}

    if not options.data and not any(each.source for each in sets):  # two files of statistics need no network
        check(len(saved_networks) < 2, "the two files hold statistics of different networks")
        is_fid = any(name.startswith(INCEPTION_DIGEST) for name in saved_networks)
        distance = frechet_distance(*(each.saved[name] for each in sets for name in ("mu", "sigma")))
        of_network = "".join(saved_networks) or "an unknown network"
        return {"fid" if is_fid else "fd": distance}, {}, f"{options.fake} against {options.real}, of {of_network}"

    check(size, "statistics do not say their images' size: give --image-size")
    network, no_network = load_network(options)
    if not network:
        return {}, {"fid": no_network}, ""
    for name in saved_networks:
        check(name == network.digest, f"statistics of another network: {name}, not {network.digest}")
    fake = statistics_of_set(sets[-1], network, size, options)
    probe = None
    if options.real:
        real = statistics_of_set(sets[0], network, size, options)
    else:
        train, held_out = load_train_and_held_out(options.data, size)
        real = statistics_of_data(held_out, network, options)
        if options.features:
            fitted = statistics_of_data(train, network, options, n=10_000)
            probe = fitted.features, fitted.labels
    if options.save_stats and rank() == 0:
        with open(options.save_stats, "wb") as file:
            np.savez(file, mu=real.mu, sigma=real.sigma, count=len(real.features),
                     network=network.digest, image_size=size)
    if rank() > 0:
        return {}, {}, ""  # what is left takes no network, but much memory
    figures, reasons = compare(real, fake, network, options.device, probe)
    return figures, reasons, protocol_of(real, fake, options)

def evaluate_tokenizer(options):
    """A tokenizer on held-out images -> figures, reasons, protocol"""
    state = load_checkpoint(options.tokenizer, "tokenizer")
    tokenizer = build_model(FQGAN, FQGANConfig, state, options.tokenizer, options.device)
    c = tokenizer.config
    name = options.data or state.get("settings", {}).get("data")
    check(name, f"{options.tokenizer} does not say what it was trained on: name the images with --data")
    picture = options.out or Path(options.tokenizer).with_name("evaluate.png")
    refuse_output_inside_data(picture, name)
    parts, no_train = loaded(lambda: load_train_and_held_out(name, c.image_size), False, options.device)
    train, held_out = parts or (None, load_data(name, c.image_size, train=False))
    indices = shuffled_range(len(held_out))[:options.n]
    network, no_network = None, "fewer than 4 images"
    if len(indices) >= 4:
        network, no_network = load_network(options)
    lpips, no_lpips = None, "images are under 16 pixels"
    if c.image_size >= 16:
        make_lpips = lambda: LPIPS(options.vgg, options.lpips).to(options.device)
        lpips, no_lpips = loaded(make_lpips, options.vgg or options.lpips, options.device)
    reasons = {"rfd" if options.features else "rfid": no_network, "lpips": no_lpips, "probe_all": no_train}
    reasons = {name: reason for name, reason in reasons.items() if reason}
    print0(f"{options.tokenizer}: k={c.k} sub-codebooks of {c.codebook_size} codes; held out: {held_out.description}")
    images = torch.stack([held_out[i][0] for i in indices[:10]]).to(options.device)
    if rank() == 0:
        with warn_if_unwritable(picture):
            save_grid(picture, reconstruction_rows(tokenizer, images))

    def measure_batch(images, labels):
        originals = from_uint8(images)
        ids = tokenizer.encode(originals)
        decoded = to_uint8(tokenizer.decode(ids))
        scores = [score(originals, from_uint8(decoded)) for score in (psnr, ssim, lpips) if score]
        row = [labels, ids, torch.stack(scores, 1)]
        if network:
            row += [*network(images), *network(decoded)]
        return row

    rows = (measure_batch(*batch) for batch in batches_of(held_out, indices, options))
    labels, ids, scores, *seen = collect(rows, "images")
    figures = dict(zip(("psnr", "ssim", "lpips"), scores.mean(0).tolist()))  # without LPIPS, the first two

    # the training images that classifiers are fitted to, five times as many
    with_probe = train and len(train.classes) > 1
    probe = None
    if with_probe:
        part = shuffled_range(len(train))[:min(10_000, 5 * len(indices))]
        rows = ((y, tokenizer.encode(from_uint8(x)), *(network(x)[:1] if network and options.features else ()))
                for x, y in batches_of(train, part, options))
        train_labels, train_ids, *train_features = collect(rows, "training images")
        if train_features:
            probe = train_features[0], train_labels

    if rank() > 0:
        return {}, {}, ""  # what is left takes no network, but much memory
    protocol = ""
    if network:
        description = f"{len(indices)} images, {held_out.description}"
        classes = held_out.classes if with_probe else None
        real = statistics_of_features(description, *seen[:2], labels, classes)
        fake = statistics_of_features(f"their reconstructions, {ROUNDING}", *seen[2:], labels, classes)
        compared, more_reasons = compare(real, fake, network, options.device, probe)
        reasons |= more_reasons
        figures |= {"r" + name if name in ("fid", "fd") else name: value for name, value in compared.items()}
        protocol = protocol_of(real, fake, options)
    code_probe = (train_ids, train_labels) if with_probe else None
    return figures | code_figures(tokenizer, ids, labels, code_probe), reasons, protocol

def code_figures(tokenizer, ids, labels, probe):
    """What the codes (N,k,h,w) of images tell. probe: (ids, labels) to fit a classifier to"""
    figures = {}
    V = tokenizer.config.codebook_size
    vectors = []
    for i, branch in enumerate(tokenizer.cpu().branches):
        share, perplexity = code_usage(ids[:, i].flatten().bincount(minlength=V))
        figures[f"usage_{i + 1}"] = share.item()
        figures[f"perplexity_{i + 1}"] = perplexity.item()
        if probe:
            vectors.append([branch.quantizer.lookup(codes[:, i]).flatten(1) for codes in (probe[0], ids)])
            figures[f"probe_{i + 1}"] = linear_probe(vectors[i][0], probe[1], vectors[i][1], labels)
    if len(vectors) > 1:
        x, held_x = [torch.cat(columns, 1) for columns in zip(*vectors)]
        figures["probe_all"] = linear_probe(x, probe[1], held_x, labels)
    pools = [branch.pool for branch in tokenizer.branches]
    for i, j in combinations(range(len(ids[0])), 2):
        step = max(1, min(pools[i], pools[j]))  # positions of a square share both codes: one of them counts
        a, b = [ids[:, n, ::step, ::step].flatten().numpy() for n in (i, j)]
        shuffled = np.random.default_rng(0).permutation(b)
        figures[f"mutual_information_{i + 1}_{j + 1}"] = mutual_information(a, b)
        figures[f"mutual_information_{i + 1}_{j + 1}_by_chance"] = mutual_information(a, shuffled)
    return figures

# -----------------------------------------------------------------------------

def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--tokenizer", default="out/tokenizer.pt", help="a tokenizer (default: %(default)s)")
    add("--data", help="`shapes`, a folder, cifar10 or cifar100: its held-out part is taken (default: the tokenizer's)")
    add("--n", "--count", type=int, help="held-out images (default: all); torchrun has its own --n: use --count")
    add("--real", help="a folder of images or an .npz, in the place of a tokenizer")
    add("--fake", help="a folder of images or an .npz, measured against --real or --data")
    add("--image-size", type=int, help="what the images of both are cropped to (default: the smaller size)")
    add("--features", metavar="FILE", help="a network in place of FID's: TorchScript or torch.export")
    add("--save-stats", metavar="FILE", help="write mu and sigma of the real images, for --real")
    add("--json", metavar="FILE", help="write the metrics there too")
    add("--out", metavar="FILE", help="picture of reconstructions (default: evaluate.png beside the tokenizer)")
    add("--inception", metavar="FILE", help="the FID network's weights (default: fetched once)")
    add("--vgg", metavar="FILE", help="VGG-16's weights, for LPIPS (default: fetched once)")
    add("--lpips", metavar="FILE", help="LPIPS v0.1's own weights (default: fetched once)")
    add("--batch-size", type=int, default=64, help="images at a time (default: %(default)s)")
    add("--device", default="auto", help="cuda, mps, cpu, ... (default: the best there is)")
    options = parser.parse_args()
    check(options.n is None or options.n >= 1, "--n must be at least 1")
    check(options.batch_size >= 1, "--batch-size must be at least 1")
    check(not options.fake or bool(options.real) != bool(options.data), "--fake is measured against --real or --data")
    check(options.fake or not options.real, "--real goes with --fake")
    check(not (options.fake and options.n), "--n does not apply to --real and --fake, which are taken whole")
    check(options.image_size is None or options.image_size >= 1, "--image-size must be at least 1")
    check(options.fake or not (options.image_size or options.save_stats), "--image-size, --save-stats go with --fake")
    check(not (options.fake and options.out), "--out, a picture of reconstructions, does not go with --fake")
    check(not options.out or options.out.lower().endswith(".png"), f"--out {options.out}: name a .png file")
    for file in filter(None, (options.json, options.save_stats, options.out)):
        check(Path(file).absolute().parent.is_dir(), f"{file}: there is no such folder")
        for data in (options.data, options.real, options.fake):
            refuse_output_inside_data(file, data)
    options.device = setup_device(options.device)

    with torch.no_grad():
        figures, reasons, protocol = evaluate_sets(options) if options.fake else evaluate_tokenizer(options)
    for name, value in figures.items():
        if value is not None:
            print0(f"{name.replace('_', ' '):36s}{value:.4f}")
    for name, reason in reasons.items():
        print0(f"{name.replace('_', ' '):36s}n/a: {reason}")
    if protocol:
        print0(f"protocol: {protocol}")
    if options.json and rank() == 0:
        contents = figures | dict.fromkeys(reasons) | {"missing": reasons, "protocol": protocol}
        Path(options.json).write_text(json.dumps(contents, indent=1))

if __name__ == "__main__":
    cli(main)
