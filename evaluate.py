"""
Measures a tokenizer, a GPT's samples, or two sets of images.

$ python evaluate.py                                          # out/tokenizer.pt on its held-out images
$ python evaluate.py --gpt out/gpt.pt --n 50000 --real VIRTUAL_imagenet256_labeled.npz
$ python evaluate.py --real photos/ --fake samples/           # folders of images, or .npz files
$ python evaluate.py --features dinov2_vitb14                 # another network in place of FID's
$ python evaluate.py --gpt out/gpt.pt --sweep 1.5,2,3 0.9,1   # each guidance at each temperature
$ torchrun --nproc-per-node=8 evaluate.py --json metrics.json # the same metrics, sooner

The protocol is that of ADM's evaluator: Dhariwal and Nichol, https://arxiv.org/abs/2105.05233.
"""

import json
import math
import os
from argparse import Namespace
from collections import namedtuple
from functools import partial
from itertools import combinations, product
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models import inception_v3

from fqgan import (
    Folder, IMAGE_ENDINGS, ImageData, LPIPS, Parser, UserError, add_sampling_flags, atomic_write, check, cli,
    code_usage, data_name, data_parts, fetch, fixed_sample, from_uint8, gather, generate_images,
    init_distributed, load_generator, load_teacher, load_tokenizer, load_weights, one_line, print0, psnr, rank,
    rank0_first, rank_batches, reconstruction_rows, save_grid, to_uint8, world_size)

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
    al., https://arxiv.org/abs/1706.08500. The root's trace is that of the symmetric (A^T S2 A)^(1/2), A A^T = S1.
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
    """Features (N,D), (M,D) -> two shares. Source: Kynkaanniemi et al., https://arxiv.org/abs/1904.06991."""
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
    for features, label in zip(held_x.split(1024), held_labels.split(1024)):  # one-hot codes take much memory
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

class Inception(nn.Module):
    """
    The FID network: the 2015-12-05 Inception graph. Its 1008 logits are without the final bias. It is torchvision's
    Inception v3, but blocks average without counting the padding, and the last one takes maxima.
    """

    url = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"

    def __init__(self, weights=None):
        super().__init__()
        self.net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
        load_weights(self.net, fetch(self.url, "6726825d", local=weights))
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

def load_network(make, weights, options, metrics, name):
    """make(*weights), or None where these cannot be had: metrics[name] then says why."""
    try:
        with rank0_first():
            return make(*weights).to(options.device)
    except UserError as error:
        if any(weights):  # a file that the user names must be there
            raise
        metrics[name] = str(error)

def feature_network(options, metrics, name):
    """The FID network, or the one that --features names, which has no logits."""
    def features_only(images):
        try:
            features = teacher(from_uint8(images)).float()
        except (AttributeError, RuntimeError) as error:
            raise UserError(f"--features fails on images {tuple(images.shape)} ({one_line(error)})") from None
        check(features.ndim == 2, f"--features gives {tuple(features.shape)} in place of (B, D)")
        return features, features[:, :0]

    if not options.features:
        return load_network(Inception, [options.inception], options, metrics, name)
    teacher = load_network(load_teacher, [options.features], options, metrics, name)
    return features_only

# -----------------------------------------------------------------------------
# Sets of images

# batches(): this process's share, as (images uint8 (B,3,H,W), labels). statistics: mean and covariance of features
ImageSet = namedtuple("ImageSet", "description size batches statistics", defaults=[None])
ROUNDING = "8 bits as int(127.5 x + 128)"

def read_set(description, size, read, options, statistics=None):
    """read: index -> (image uint8 (3,H,W), label)"""
    def batches():
        with ThreadPool(min(8, os.cpu_count())) as pool:
            for batch in rank_batches(size, options.batch_size):
                images, labels = zip(*pool.map(read, batch))
                yield torch.stack(images).to(options.device), torch.tensor(labels)

    return ImageSet(description, size, batches, statistics)

def part_of(data, n, options):
    """n random images of a data set, always the same; None: all of them, in order."""
    def read(i):
        images, label = data.views(indices[i], 1)
        return to_uint8(images[0]), label

    indices = fixed_sample(len(data))[:n] if n else range(len(data))
    crop = f"ADM's resize and center crop to {data.image_size}"
    description = f"{len(indices)} images, {data.description}, {crop}"
    return read_set(description, len(indices), read, options)

def open_set(path, options, image_size=None):
    """A folder of images, cropped to image_size or the first one's; or an .npz of images, mu and sigma, or both."""
    if os.path.isdir(path):
        source = Folder(path)
        data = ImageData(source, source.classes, 0, False, f"{path}{source.notes}")
        first, _ = data.read(0)
        data.image_size = image_size or min(first.size)
        return part_of(data, None, options)
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except Exception as error:
        raise UserError(f"{path} is neither a folder nor an .npz file ({one_line(error)})") from None
    images = arrays.get("arr_0", np.zeros((0, 1, 1, 3), np.uint8))
    check(images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3,
          f"{path}: arr_0 is {images.dtype} {images.shape}; expected uint8 (N, height, width, 3)")
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    statistics = None
    if {"mu", "sigma"} <= arrays.keys() and not (options.features and len(images)):
        statistics = arrays["mu"], arrays["sigma"]
    check(len(images) or statistics, f"{path} holds {list(arrays)}; expected arr_0, or mu and sigma")
    description = f"statistics in {path}" if statistics else f"{len(images)} images in {path}, as stored"
    return read_set(description, len(images), lambda i: (images[i], 0), options, statistics)

def collect(batches, what):
    """This rank's share of batches (x, y, ...) -> on rank 0 [x, y, ...], whole and in order; on others None"""
    parts = []
    for batch in batches:
        parts.append([column.cpu() for column in batch])
        if len(parts) % 100 == 0:
            print0(f"{what}: batch {world_size() * len(parts)}")
    ranks = gather(parts)
    if rank() > 0:
        return None
    num_batches = sum(len(parts) for parts in ranks)
    parts = [ranks[i % len(ranks)][i // len(ranks)] for i in range(num_batches)]  # as rank_batches deals them
    return [torch.cat(column) for column in zip(*parts)]

def measure(images, network):
    """A set -> on rank 0 (features, logits, labels)"""
    rows = ((*network(batch), labels) for batch, labels in images.batches())
    return collect(rows, images.description) or (None, None, None)

def statistics_of(features):
    """(N,D) -> mean (D) and covariance (D,D), float64 arrays"""
    features = features.double()
    return features.mean(0).numpy(), features.T.cov().numpy()

# -----------------------------------------------------------------------------
# What is measured: `metrics` gets, on rank 0, numbers by name, or the reason why there is none

def have_classes(train, held_out):
    """Whether there are several classes, and images of them to fit a classifier to."""
    return len(train.classes) > 1 and train.description != held_out.description

def compare(metrics, prefix, real, fakes, options, parts=None):
    """
    A set against others: -> on rank 0 the figures of each of the others, a list of dicts, whose first goes into
    `metrics`. parts: training and held-out images with the fakes' classes, if there are any
    """
    name = prefix + ("fd" if options.features else "fid")
    network_name = options.features or "Inception 2015-12-05, TensorFlow 1's resize"
    metrics["protocol"] = f"{network_name}; {fakes[0].description}; against {real.description}"
    if any(0 < images.size < 4 for images in (real, *fakes)):
        metrics[name] = "fewer than 4 images"
        return []
    need_network = any(images.size for images in (real, *fakes))
    network = feature_network(options, metrics, name) if need_network else None
    if name in metrics:
        return []
    real_features, _, _ = measure(real, network)
    can_name = options.features and parts and have_classes(*parts)
    if can_name:
        n = min(10_000, 5 * fakes[0].size)
        train_x, _, train_labels = measure(part_of(parts[0], n, options), network)
        held_x, _, held_labels = measure(part_of(parts[1], n, options), network)
    if rank() == 0:
        mu, sigma = real.statistics or statistics_of(real_features)
        if can_name:
            named_real = linear_probe(train_x, train_labels, held_x, held_labels)
    if options.save_stats and rank() == 0:
        with atomic_write(options.save_stats) as tmp, open(tmp, "wb") as file:
            np.savez(file, mu=mu, sigma=sigma)

    figures = []
    for fake in fakes:
        features, logits, labels = measure(fake, network)
        if rank() > 0:
            continue
        row = {name: frechet_distance(mu, sigma, *(fake.statistics or statistics_of(features)))}
        if real.size and fake.size:
            device = options.device if options.device.type == "cuda" else "cpu"  # mps has no float64
            row["precision"], row["recall"] = precision_recall(real_features.to(device), features.to(device))
        if fake.size and not options.features:
            row["inception_score"], row["inception_score_deviation"] = inception_score(logits)
        if can_name:  # the share whose class a linear classifier, fitted on real features, gets right
            row["named"] = linear_probe(train_x, train_labels, features, labels)
            row["named_real"] = named_real
        figures.append(row)
    metrics.update(*figures[:1])
    return figures

def evaluate_gpt(metrics, options):
    gpt, tokenizer, classes = load_generator(options.gpt, options.tokenizer, options.device, options.grid)
    labels = torch.arange(options.n or 5000) % len(classes)
    image_size = gpt.config.grid * tokenizer.config.downsample
    parts = None
    if options.data or not options.real:
        train, held_out = data_parts(data_name(options.data, gpt, options.gpt), image_size)
        real = part_of(held_out if len(held_out) >= 2000 else train, 50_000, options)
        if len(train.classes) == len(classes):
            parts = (train, held_out)
    if options.real:
        real = open_set(options.real, options, image_size)

    def samples(options):
        def generate():
            batches = rank_batches(len(labels), options.batch_size)
            for batch, images in generate_images(gpt, tokenizer, labels, batches, options):
                yield to_uint8(images), labels[batch.start:batch.stop]

        names = ("cfg_scale", "temperature", "top_k", "top_p", "seed", "batch_size", "dtype")
        flags = ", ".join(f"{name} {getattr(options, name)}" for name in names)
        description = f"{len(labels)} samples of {options.gpt}, labels balanced, {flags}, {ROUNDING}"
        return ImageSet(description, len(labels), generate)

    scales, temperatures = options.sweep or ([options.cfg_scale], [options.temperature])
    settings = []
    for scale, temperature in product(scales, temperatures):
        given = vars(options) | {"cfg_scale": scale, "temperature": temperature}
        settings.append(Namespace(**given))
    figures = compare(metrics, "", real, [samples(setting) for setting in settings], options, parts)
    if options.sweep:
        metrics["sweep"] = []
        for setting, row in zip(settings, figures):
            metrics["sweep"].append({"cfg_scale": setting.cfg_scale, "temperature": setting.temperature, **row})

def evaluate_tokenizer(metrics, options):
    path = Path(options.tokenizer or "out/tokenizer.pt")
    tokenizer = load_tokenizer(path, options.device)
    c = tokenizer.config
    parts = data_parts(data_name(options.data, tokenizer, path), c.image_size)
    images = part_of(parts[1], options.n or len(parts[1]), options)
    train = part_of(parts[0], min(10_000, 5 * images.size), options)
    print0(f"{path}: k={c.k} sub-codebooks of {c.codebook_size} codes; {images.description}")
    if rank() == 0:
        batch, _ = next(images.batches())
        rows = reconstruction_rows(tokenizer, from_uint8(batch[:10]))
        save_grid(options.out or path.parent / "evaluate.png", rows)

    distances = {"psnr": psnr, "ssim": ssim}
    lpips = None
    if c.image_size < 16:
        metrics["lpips"] = "images are under 16 pixels"
    else:
        lpips = load_network(LPIPS, [options.vgg, options.lpips], options, metrics, "lpips")
    if lpips:
        distances["lpips"] = lpips

    def encode(images):
        for batch, labels in images.batches():
            yield tokenizer.encode(from_uint8(batch)), labels

    encoded = []  # what score() has encoded of this rank's images: (ids, labels)

    def reconstruct():
        for ids, labels in encoded:
            yield to_uint8(tokenizer.decode(ids.to(options.device))), labels

    def score():
        for batch, labels in images.batches():
            originals = from_uint8(batch)
            ids = tokenizer.encode(originals)
            encoded.append((ids.cpu(), labels))
            decoded = from_uint8(to_uint8(tokenizer.decode(ids)))
            scores = [distance(originals, decoded) for distance in distances.values()]
            yield torch.stack(scores, 1), ids, labels

    scored = collect(score(), "scores")
    if scored:
        metrics.update(zip(distances, scored[0].mean(0).tolist()))
    probe = collect(encode(train), "codes for the probe") if have_classes(*parts) else None
    description = f"its {images.size} reconstructions, {ROUNDING}"
    compare(metrics, "r", images, [ImageSet(description, images.size, reconstruct)], options, parts)
    if rank() > 0:
        return

    tokenizer.cpu()
    _, ids, labels = scored
    vectors = []  # of each sub-codebook, for the probe: (training images', held-out ones')
    for i, branch in enumerate(tokenizer.branches):
        counts = ids[:, i].flatten().bincount(minlength=c.codebook_size)
        share, perplexity = code_usage(counts)
        metrics[f"usage_{i + 1}"] = share.item()
        metrics[f"perplexity_{i + 1}"] = perplexity.item()
        if probe:
            x, held_x = [branch.quantizer.lookup(codes[:, i]).flatten(1) for codes in (probe[0], ids)]
            metrics[f"probe_{i + 1}"] = linear_probe(x, probe[1], held_x, labels)
            vectors.append((x, held_x))
    if len(vectors) > 1:
        x, held_x = [torch.cat(columns, 1) for columns in zip(*vectors)]
        metrics["probe_all"] = linear_probe(x, probe[1], held_x, labels)
    for i, j in combinations(range(c.k), 2):
        a = ids[:, i].flatten().numpy()
        b = ids[:, j].flatten().numpy()
        shuffled = np.random.default_rng(0).permutation(b)
        metrics[f"mutual_information_{i + 1}_{j + 1}"] = mutual_information(a, b)
        metrics[f"mutual_information_{i + 1}_{j + 1}_by_chance"] = mutual_information(a, shuffled)

# -----------------------------------------------------------------------------
# Report

def report(metrics, options):
    protocol = metrics.pop("protocol")
    sweep = metrics.pop("sweep", [])
    network = Path(options.features or "").name
    titles = {"fid": "FID", "rfid": "rFID", "fd": f"FD ({network})", "rfd": f"rFD ({network})"}
    for name, value in metrics.items():
        title = titles.get(name, name.replace("_", " "))
        print0(f"{title:36s}" + (f"n/a: {value}" if isinstance(value, str) else f"{value:.4f}"))
        if name in titles:
            print0(f"    {protocol}")
    for row in sweep:
        print0("  ".join(f"{name} {value:.3f}" for name, value in row.items()))
    if options.json and rank() == 0:
        missing = {name: value for name, value in metrics.items() if isinstance(value, str)}
        contents = metrics | dict.fromkeys(missing) | {"missing": missing, "protocol": protocol}
        if sweep:
            contents["sweep"] = sweep
        Path(options.json).write_text(json.dumps(contents, indent=1))

def floats(text):
    """"1.5,2" -> [1.5, 2.0]"""
    return [float(word) for word in text.split(",")]

def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--tokenizer", help="a tokenizer (default: out/tokenizer.pt); with --gpt, in place of the GPT's own")
    add("--gpt", help="a GPT, whose samples are measured")
    add("--real", help="a folder or an .npz (default with --gpt: 50,000 held-out images at most, or training images "
        "where fewer than 2,000 are held out)")
    add("--fake", help="a folder or an .npz, measured against --real")
    add("--data", help="`shapes`, a folder, or a torchvision name (default: the model's own)")
    add("--n", "--count", type=int, help="images (default: all held-out ones) or samples (default: 5000, the classes "
        "in turn); torchrun has its own --n: use --count")
    add("--grid", type=int, help="positions along a side, for published GPTs of 384 pixels: 24")
    add("--sweep", nargs=2, type=floats, metavar=("SCALES", "TEMPERATURES"), help="with --gpt: a row of figures "
        "for each guidance at each temperature, such as 1.5,2,3 0.9,1")
    add("--features", metavar="NAME", help="a network in place of FID's: a name or file, as for --teachers")
    add("--save-stats", metavar="FILE", help="write mu and sigma of the real images, for --real")
    add("--json", metavar="FILE", help="write the metrics there too")
    add("--out", type=Path, help="picture of reconstructions (default: evaluate.png beside it)")
    add("--inception", metavar="FILE", help="the FID network's weights (default: fetched once)")
    add("--vgg", metavar="FILE", help="VGG-16's weights, for LPIPS (default: fetched once)")
    add("--lpips", metavar="FILE", help="LPIPS v0.1's own weights (default: fetched once)")
    add_sampling_flags(parser)
    options = parser.parse_args()
    check(options.n is None or options.n >= 1, "--n must be at least 1")
    check(options.batch_size >= 1, "--batch-size must be at least 1")
    check(not (options.fake and options.n), "--n does not apply to --real and --fake, which are taken whole")
    check(not options.out or options.out.suffix.lower() in IMAGE_ENDINGS,
          f"--out {options.out}: name a picture, such as evaluate.png")
    check(options.gpt or not options.sweep, "--sweep goes with --gpt")
    check(not (options.gpt and options.fake), "--gpt and --fake exclude each other")
    check(bool(options.fake) == bool(options.real and not options.gpt), "--real goes with --fake or with --gpt")
    for file in filter(None, (options.json, options.save_stats, options.out)):
        check(Path(file).absolute().parent.is_dir(), f"{file}: there is no such folder")
    options.device = init_distributed(options.device, options.seed)
    metrics = {}
    with torch.no_grad():
        if options.gpt:
            evaluate_gpt(metrics, options)
        elif options.fake:
            compare(metrics, "", open_set(options.real, options), [open_set(options.fake, options)], options)
        else:
            evaluate_tokenizer(metrics, options)
    report(metrics, options)

if __name__ == "__main__":
    cli(main)
