"""
Measures a tokenizer, a GPT, or any two sets of images: the paper's figures, without TensorFlow.

$ python evaluate.py                                        # out/tokenizer.pt: PSNR, SSIM, LPIPS, rFID, and its sub-codebooks
$ python evaluate.py --gpt out/gpt.pt --n 50000 --real VIRTUAL_imagenet256_labeled.npz
$ python evaluate.py --real photos/ --fake samples/         # folders, or .npz files as ADM's
$ torchrun --nproc-per-node=8 evaluate.py --json figures.json                           # the same figures, sooner

Sources:
1) the FID network and its statistics: Heusel et al., https://arxiv.org/abs/1706.08500; the weights: pytorch-fid
2) the protocol: ADM's evaluator, Dhariwal and Nichol, https://arxiv.org/abs/2105.05233, appendix
3) precision and recall: Kynkaanniemi et al., https://arxiv.org/abs/1904.06991, eq. 1 and 2
4) SSIM: Wang et al. 2004, with scikit-image's default window and sample covariance
"""

import functools
import hashlib
import itertools
import json
import math
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont

from fqgan import LPIPS, Folder, UserError, explained, fetch, load_tokenizer, read_weights, require, to_uint8, upright_rgb
from sample import generate, load_generator, parse_knobs, stamp
from train_tokenizer import Parser, cli, data_name, duration, fixed_draw, load_parts, per_code, psnr, replacing, reconstruction_rows, save_grid, start, usage

# -----------------------------------------------------------------------------
# Metrics


def ssim(images, others):
    """
    (B,3,H,W) in [-1,1] twice, at least 7x7 -> (B,) structural similarity of the images as 8-bit files hold them: 7x7 windows
    of equal weights inside the image, sample covariance, mean over channels, data range 255.
    """
    require(min(images.shape[-2:]) >= 7, f"images are {images.shape[-1]}x{images.shape[-2]}; SSIM's window is 7x7")
    x, y = (to_uint8(i).float() / 255 for i in (images, others))
    mean_x, mean_y, xx, yy, xy = F.avg_pool2d(torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 1), 7, 1).unflatten(0, (5, -1))
    sample = 49 / 48  # the unbiased covariance of a window's 49 pixels
    var_x, var_y, cov = sample * (xx - mean_x**2), sample * (yy - mean_y**2), sample * (xy - mean_x * mean_y)
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean((1, 2, 3))


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """
    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two Gaussians; float64 arrays (D), (D,D), (D), (D,D) -> float.

    The square root's trace is that of the symmetric (A^T S2 A)^(1/2), for any A with A A^T = S1: never negative or complex, and
    S1 may be singular. Raises UserError where shapes differ or a value is not finite.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    require(mu1.shape == mu2.shape and sigma1.shape == sigma2.shape == mu1.shape * 2,
            f"statistics of other shapes: {mu1.shape}, {sigma1.shape} and {mu2.shape}, {sigma2.shape}")
    require(all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)), "statistics that are not finite")
    values, vectors = scipy.linalg.eigh(sigma1)
    root = vectors * np.sqrt(values.clip(0))
    product = scipy.linalg.eigvalsh(root.T @ sigma2 @ root)
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(product.clip(0)).sum())


def inception_score(logits, split_size=5000):
    """logits (N, classes) -> (mean, deviation) over runs of split_size of exp(mean KL(p(y|x) || p(y))); the last run may be shorter."""
    require(len(logits), "no images to take the Inception Score of")
    scores = []
    for part in torch.as_tensor(logits).double().split(split_size):
        log_p = part.log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    return float(torch.stack(scores).mean()), float(torch.stack(scores).std(correction=0))


def precision_recall(real, fake, k=3):
    """
    Features (N,D), (M,D) -> (share of fakes within reach of a real one, share of reals within reach of a fake), where a point reaches
    as far as its k-th nearest neighbour in its own set. Raises UserError for sets of at most k points.
    """
    real, fake = (torch.as_tensor(x).double() for x in (real, fake))
    require(min(len(real), len(fake)) > k, f"precision and recall need more than {k} images in both sets; there are {len(real)} and {len(fake)}")

    def squares(some, points):  # distances, squared, without the (N,M,D) differences
        return (some.square().sum(1)[:, None] + points.square().sum(1) - 2 * some @ points.T).clamp(min=0)

    def reach(points):
        return torch.cat([squares(some, points).kthvalue(k + 1).values for some in points.split(1024)])  # the nearest is the point itself

    def covered(points, others):
        radius = reach(others)
        return float(torch.cat([(squares(some, others) <= radius).any(1) for some in points.split(1024)]).double().mean())

    return covered(fake, real), covered(real, fake)


def mutual_information(a, b):
    """Two integer arrays (n) -> bits that one tells of the other, as counted: n must be well above the number of pairs, or it reads high."""
    def entropy(values):
        p = np.unique(values, return_counts=True)[1] / len(values)
        return float(-(p * np.log2(p)).sum())

    a, b = a.astype(np.int64), b.astype(np.int64)
    return entropy(a) + entropy(b) - entropy(a * (int(b.max()) + 1) + b)


def linear_probe(x, labels, held_x, held_labels):
    """
    Features (n,F), labels (n), and held-out ones -> share of the held-out labels that a linear classifier gets right: least squares
    onto one-hot labels, with a ridge of a hundredth of the features' mean variance.
    """
    mean, classes = x.mean(0), int(max(labels.max(), held_labels.max())) + 1
    x, held_x, y = (x - mean).double(), (held_x - mean).double(), F.one_hot(labels, classes).double()
    gram = (x.T @ x).numpy()
    gram[np.diag_indices_from(gram)] += 0.01 * gram.trace() / len(gram) + 1e-9
    weight = scipy.linalg.solve(gram, (x.T @ (y - y.mean(0))).numpy(), assume_a="pos")
    return float(((held_x @ torch.from_numpy(weight) + y.mean(0)).argmax(1) == held_labels).double().mean())


# -----------------------------------------------------------------------------
# The FID network

INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth", "6726825d")


def tf1_resize(x, size=299):
    """(B,3,H,W) -> (B,3,size,size), bilinear as in TensorFlow 1: pixel i is taken at i * side / size, without half a pixel's shift."""
    for dim in (3, 2):
        side = x.shape[dim]
        at = torch.arange(size, dtype=torch.float32, device=x.device) * (np.float32(side) / np.float32(size)).item()
        low = at.long().clamp(max=side - 1)
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=side - 1))
        x = a + (b - a) * (at - low).view([-1 if d == dim else 1 for d in range(4)])
    return x


class Inception(nn.Module):
    """
    The 2015-12-05 Inception graph: images uint8 (B,3,H,W) -> (features (B,2048), logits (B,1008) without the final bias).

    torchvision's Inception v3 with other pooling in the branches: averages do not count the padding, and the last block takes
    maxima. weights: a local file; without it, fetched once into torch.hub's cache. Raises UserError if they cannot be had.
    """

    def __init__(self, weights=None):
        super().__init__()
        self.net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
        read_weights(self.net, fetch(*INCEPTION, local=weights))
        self.last, self.net.fc = self.net.fc.weight, nn.Identity()
        for name, block in self.net.named_children():
            if hasattr(block, "branch_pool"):
                self.pool_by(block, F.max_pool2d if name == "Mixed_7c" else lambda x, *size: F.avg_pool2d(x, *size, count_include_pad=False))
        self.eval().requires_grad_(False)

    @staticmethod
    def pool_by(block, pool):
        """torchvision pools inside a block's forward: its branch_pool is given our own pooling of the block's input instead."""
        def remember(block, inputs):
            block.branch_pool.given = inputs[0]

        def replace(unit, _):
            return (pool(unit.__dict__.pop("given"), 3, 1, 1),)

        block.register_forward_pre_hook(remember)
        block.branch_pool.register_forward_pre_hook(replace)

    def forward(self, images):
        features = self.net((tf1_resize(images.float()) - 128) / 128)
        return features, F.linear(features, self.last)


# -----------------------------------------------------------------------------
# Ranks


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def agree(item):
    """What each rank gives, something small, as a list on every rank."""
    every = [item] * world()
    if world() > 1:
        dist.all_gather_object(every, item)
    return every


def gather(item):
    """What each rank gives, as a list on rank 0; an empty one on the others."""
    if world() == 1:
        return [item]
    every = [None] * world() if rank() == 0 else None
    dist.gather_object(item, every)
    return every or []


def say(*words):
    if rank() == 0:
        print(*words, flush=True)


def shares(total, size):
    """This rank's batches of the numbers 0 to total, `size` at a time: all ranks together have each once."""
    return [range(i, min(i + size, total)) for i in range(0, total, size)][rank()::world()]


def progress(batches, what, total):
    """Passes (numbers, ...) through; every ten seconds says how many images are done and how long the rest will take."""
    began = told = time.time()
    done = 0
    for batch in batches:
        yield batch
        done += len(batch[0]) * world()
        if time.time() > told + 10:
            told, speed = time.time(), done / (time.time() - began)
            say(f"{what}: {min(total, done)} of {total} images, {speed:.1f} images/s, {duration(max(0, total - done) / speed)} left")


# -----------------------------------------------------------------------------
# Sets of images: items are (image uint8 (3,H,W), label)


def read_file(name, size=None):
    with explained(f"{str(name)!r} cannot be read", ": mend or remove it"), Image.open(name) as file:
        image = torch.from_numpy(np.array(upright_rgb(file))).permute(2, 0, 1)
    height, width = size or image.shape[1:]
    require(image.shape[1:] == (height, width),
            f"{str(name)!r} is {image.shape[2]}x{image.shape[1]}, the first of its set {width}x{height}: all must have one size")
    return image, 0


def read_array(pixels):
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1), 0


def read_data(data, index):
    """Of one of load_data's sets, center-cropped, with its label."""
    images, label = data.crops(index)
    return to_uint8(images[0]), label


class ImageSet(torch.utils.data.Dataset):
    """
    Items are (number, image, label): read(item) for each of `items`. `files` hold all that makes the set what it is, else its name does;
    `place` is where its statistics are kept, less an ending; `statistics`: mu and sigma, where a file brings its own.
    """

    def __init__(self, name, items, read, files, place, statistics=()):
        self.name, self.items, self.read, self.files, self.place, self.statistics = name, items, read, files, place, dict(statistics)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, number):
        return number, *self.read(self.items[number])

    def batches(self, size):
        """This rank's share: (numbers, images uint8 (B,3,H,W), labels)"""
        workers = min(8, (os.cpu_count() or 1) // world()) if len(self) > 1000 and self.read is not read_array else 0
        return torch.utils.data.DataLoader(self, batch_sampler=shares(len(self), size), num_workers=workers)

    def digest(self):
        """Of the names, sizes and times of the files, and the pixels of a few images."""
        files = [(os.path.relpath(p, self.place.parent), stamp(p)) for p in self.files]
        digest = hashlib.sha256(f"{len(self)} {files or self.name}".encode(errors="surrogateescape"))
        for i in range(min(8, len(self))):
            digest.update(self[i][1].numpy().tobytes())
        return digest


def part_of(data, indices):
    """The ImageSet of the images of one of load_data's sets that `indices` name."""
    files = [Path(data.source.samples[i][0]) for i in indices] if isinstance(data.source, Folder) else []
    place = Path(os.path.commonpath([p.parent for p in files])).resolve() if files else Path(torch.hub.get_dir()) / "statistics" / "set"
    return ImageSet(f"{len(indices)} images of {data.origin}", indices, functools.partial(read_data, data), files, place)


def open_set(path):
    """The ImageSet of a folder, or of an .npz as ADM's: images arr_0, statistics mu and sigma, or both. UserError for anything else."""
    path = Path(path)
    if path.is_dir():
        files = Folder.files(path)
        require(files, f"{path} holds no image")
        size = read_file(files[0])[0].shape[1:]
        return ImageSet(f"{path} ({len(files)} images)", files, functools.partial(read_file, size=size), files, path.resolve())
    require(path.exists(), f"{path}: no such file or folder")
    require(path.is_file() and path.suffix == ".npz", f"{path}: give a folder of images, or an .npz of images (arr_0) or statistics (mu, sigma)")
    array, statistics = np.empty((0, 1, 1, 3), np.uint8), {}
    with explained(f"{path} cannot be read"):
        with np.load(path, allow_pickle=False) as file:
            keys = sorted(file.files)
            if {"mu", "sigma"} <= set(keys):
                statistics = {name: file[name].astype(np.float64) for name in ("mu", "sigma")}
            require(statistics or "arr_0" in keys, f"{path} holds {', '.join(keys) or 'nothing'}; expected arr_0 (images), or mu and sigma (statistics)")
        if "arr_0" in keys:
            array = map_array(path, "arr_0.npy")
    require(array.dtype == np.uint8 and array.ndim == 4 and array.shape[3] == 3,
            f"{path}: arr_0 is {array.dtype} {array.shape}; expected uint8 (N, height, width, 3)")
    if statistics:
        mu, sigma = statistics.values()
        require(mu.ndim == 1 and sigma.shape == mu.shape * 2, f"{path}: mu is {mu.shape} and sigma {sigma.shape}; expected (D,) and (D, D)")
    require(len(array) or statistics, f"{path} holds no images")
    return ImageSet(f"{path} ({len(array)} images)" if len(array) else str(path), array, read_array, [path], path.resolve(), statistics)


def map_array(path, name):
    """An array in an .npz: memory-mapped where it is stored as numpy.savez does it, uncompressed; else loaded."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(name)
        with archive.open(name) as member:
            version = np.lib.format.read_magic(member)
            shape, fortran, dtype = (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(member)
            header = member.tell()
    if info.compress_type != zipfile.ZIP_STORED or fortran or dtype.hasobject:
        return np.load(path, allow_pickle=False)[name.removesuffix(".npy")]
    with open(path, "rb") as file:  # at 26 and 28 of the entry stand the lengths of its name and its extra field
        file.seek(info.header_offset + 26)
        names = np.frombuffer(file.read(4), "<u2").sum()
    return np.memmap(path, dtype, "r", info.header_offset + 30 + int(names) + header, shape)


# -----------------------------------------------------------------------------
# The network's view of a set


class Features:
    """
    The FID network's features of a set, added batch by batch: their mean and covariance, in memory that does not grow with
    the set; of each `every`-th image also the features themselves and the logits (0: of none).
    """

    def __init__(self, network, every=0):
        self.network, self.every, self.kept = network, every, []
        self.n, self.sum, self.outer = 0, torch.zeros(2048, dtype=torch.float64), torch.zeros(2048, 2048, dtype=torch.float64)

    @torch.no_grad()
    def add(self, numbers, images):
        """numbers: the images' places in the set; images uint8 (B,3,H,W), on the network's device"""
        features, logits = (x.float().cpu() for x in self.network(images))
        exact, numbers = features.double(), torch.as_tensor(numbers)
        self.n, self.sum, self.outer = self.n + len(exact), self.sum + exact.sum(0), self.outer.addmm_(exact.T, exact)
        if self.every:
            some = numbers % self.every == 0
            self.kept.append((numbers[some], features[some], logits[some]))

    def finish(self):
        """
        -> on rank 0, arrays of all ranks' images together: mu (2048), sigma (2048,2048), and in the set's order features and logits, if
        kept; nothing on the others. Raises UserError for fewer than two images.
        """
        parts, kept = gather((self.n, self.sum, self.outer)), in_order(self.kept) if self.every else ()
        if rank():
            return {}
        n, total, outer = (sum(part) for part in zip(*parts))
        require(n >= 2, f"{n} image has no covariance: 2 are needed, and thousands for a FID that means something")
        result = {"mu": total / n, "sigma": (outer - torch.outer(total, total) / n) / (n - 1)} | dict(zip(("features", "logits"), kept))
        return {name: value.numpy() for name, value in result.items()}


def in_order(parts):
    """Batches of (numbers, x, y, ...) from all ranks -> on rank 0 [x, y, ...], whole and in the order of the numbers; nothing on the others."""
    parts = [part for each in gather(parts) for part in each]
    if not parts:
        return []
    numbers, *columns = (torch.cat(column) for column in zip(*parts))
    return [column[numbers.argsort()] for column in columns]


def features_of(images, network, options, every=0):
    """Features.finish() of an ImageSet."""
    features = Features(network, every)
    for numbers, batch, _ in progress(images.batches(options.batch_size), f"features of {images.name}", len(images)):
        features.add(numbers, batch.to(options.device))
    return features.finish()


def reference(images, network, options, every=0):
    """
    features_of a set of real images, kept in a file beside the set, whose name is made of its content and the network's, and taken from
    there the next time. Statistics that the set brings take the place of the images' own.
    """
    known, path = {}, None
    if len(images) and (every or not images.statistics):
        if rank() == 0:
            digest = images.digest()
            for tensor in network.state_dict().values():
                digest.update(tensor.cpu().numpy().tobytes())
            path = images.place.with_name(f"{images.place.name}.{digest.hexdigest()[:12]}-{every}.npz")
            try:
                with np.load(path, allow_pickle=False) as file:
                    known = dict(file)
                say(f"features of {images.name}: from {path}")
            except FileNotFoundError:
                pass
            except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
                say(f"{path} cannot be read ({error}): made again")
        if not agree(bool(known))[0]:
            known = features_of(images, network, options, every)
            if rank() == 0:
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with replacing(path, f".{os.getpid()}") as whole, open(whole, "wb") as file:
                        np.savez(file, **known)
                except OSError as error:
                    say(f"{path} cannot be written ({error}): these features are not kept for the next time")
    return known | images.statistics


# -----------------------------------------------------------------------------
# What is measured


def attempt(make, named, missing, *figures):
    """
    make(), or None on all ranks where its weights cannot be had on one: then `missing` says why, for each of `figures`. Weights that the
    user has named must be there.
    """
    made, reason = None, None
    try:
        made = make()
    except UserError as error:
        if named:
            raise
        reason = str(error)
    reason = next((r for r in agree(reason) if r), None)
    missing.update({figure: reason for figure in figures} if reason else {})
    return None if reason else made


def codes_of(images, tokenizer, options, what, use=lambda *_: ()):
    """
    An ImageSet -> [labels (n), ids (n,k,h,w), ...], and what `use` makes of (numbers, images in [-1,1], ids), tensors of a number an image;
    on rank 0, nothing on the others.
    """
    parts, kind = [], torch.int16 if tokenizer.config.codebook_size <= 2**15 else torch.int32
    for numbers, batch, labels in progress(images.batches(options.batch_size), what, len(images)):
        batch = from_uint8(batch.to(options.device))
        ids = tokenizer.encode(batch)
        parts.append((numbers.clone(), labels.clone(), ids.to(kind).cpu(), *use(numbers, batch, ids)))  # a worker's tensors hold open files
    return in_order(parts)


def from_uint8(images):
    return images.float() / 127.5 - 1


@torch.no_grad()
def reconstruction(options, missing):
    """The figures of a tokenizer, a picture of reconstructions and one of its sub-codebooks' maps."""
    path = Path(options.tokenizer)
    tokenizer = load_tokenizer(path, options.device)
    c, rng = tokenizer.config, np.random.default_rng(0)
    train, held_out = load_parts(data_name(options.data, tokenizer, path), c.image_size)
    images = part_of(held_out, fixed_draw(held_out)[:options.n])
    say(f"{path}: k={c.k} sub-codebooks of {c.codebook_size} codes; {images.name}")
    metrics, network = {"psnr": psnr, "ssim": ssim}, None
    if c.image_size < 16:
        missing |= {"lpips": "images are under 16 pixels"}
    elif lpips := attempt(lambda: LPIPS(options.vgg, options.lpips).to(options.device), options.vgg or options.lpips, missing, "lpips"):
        metrics["lpips"] = lpips
    if c.image_size < 7:
        missing |= {"ssim": "images are under 7 pixels"}
        del metrics["ssim"]
    if len(images) < 2:
        missing |= {"rfid": "one image has no covariance"}
    else:
        network = attempt(lambda: Inception(options.inception).to(options.device), options.inception, missing, "rfid")
    real = reference(images, network, options) if network else {}
    fakes = Features(network) if network else None

    seen = torch.zeros(c.k, c.codebook_size, 3 * c.downsample**2 + 1, device=options.device)  # of each code: its patches added up, and their number

    def compare(numbers, batch, ids):
        patches = F.pad(F.pixel_unshuffle(batch, c.downsample).permute(0, 2, 3, 1).flatten(0, 2), (0, 1), value=1.0)
        for i, total in enumerate(seen):
            total.index_add_(0, ids[:, i].flatten(), patches)
        painted = to_uint8(tokenizer.decode(ids))
        if fakes:
            fakes.add(numbers, painted)
        painted = from_uint8(painted)
        return [metric(batch, painted).cpu().double() for metric in metrics.values()]

    labels, ids, *scores = codes_of(images, tokenizer, options, "reconstructing", compare) or [None] * 2
    seen = gather(seen.cpu())
    fake = fakes.finish() if fakes else {}
    reasons = {"the data has no classes": len(held_out.classes) < 2, "there is no training part apart": train.origin == held_out.origin,
               "the training part has other classes": train.classes != held_out.classes}
    reason = next((words for words, applies in reasons.items() if applies), None)
    to_learn_from = fixed_draw(train)[:min(10_000, 5 * options.n) if options.n else 10_000]
    probe = [] if reason else codes_of(part_of(train, to_learn_from), tokenizer, options, "codes for the probe")
    if rank():
        return {}

    figures = {name: float(score.mean()) for name, score in zip(metrics, scores)}
    if fakes:
        figures["rfid"] = frechet_distance(real["mu"], real["sigma"], fake["mu"], fake["sigma"])
    counts = torch.stack([torch.bincount(ids[:, i].flatten().long(), minlength=c.codebook_size) for i in range(c.k)])
    for name, values in zip(("usage", "perplexity"), usage(counts)):
        figures |= per_code(name, values)
    for i, name in enumerate(f"probe_{i + 1}" for i in range(c.k)):
        if reason:
            missing[name] = reason
        else:
            vectors = [torch.cat([tokenizer.branches[i].quantizer.lookup(part[:, i].long().to(options.device)).flatten(1).cpu() for part in x.split(1024)])
                       for x in (probe[1], ids)]
            figures[name] = linear_probe(vectors[0], probe[0], vectors[1], labels)
    for i, j in itertools.combinations(range(c.k), 2):
        a, b = (ids[:, n].flatten().numpy() for n in (i, j))
        figures[f"mutual_information_{i + 1}_{j + 1}"] = mutual_information(a, b)
        figures[f"mutual_information_{i + 1}_{j + 1}_by_chance"] = mutual_information(a, rng.permutation(b))
    draw(options, path, save_grid, reconstruction_rows(tokenizer, from_uint8(first_of(images)).to(options.device)))
    draw(options, path, save_maps, tokenizer, sum(seen), suffix="_codes")
    return figures


def first_of(images):
    return torch.stack([images[i][1] for i in range(min(10, len(images)))])


@torch.no_grad()
def generation(options, missing):
    """The figures of a GPT's samples, or of any set of images, and a picture of nearest neighbours."""
    if options.gpt:
        path = Path(options.gpt)
        gpt, tokenizer, classes = load_generator(path, options.tokenizer, options.device)
        labels = torch.arange(options.n or 5000) % len(classes)
        name, fakes = f"{len(labels)} samples of {path}", None
    else:
        path, fakes = Path("out/evaluate.png"), open_set(options.fake)
        name = fakes.name
    if options.real:
        reals = open_set(options.real)
    else:
        data = load_parts(data_name(options.data, gpt, path), gpt.config.grid * tokenizer.config.downsample)[0]
        reals = part_of(data, fixed_draw(data))
    say(f"{name} against {reals.name}")
    figures = {}
    require(options.fake or len(reals.statistics.get("mu", range(2048))) == 2048, f"{reals.name} holds statistics of other features than the FID network's 2048")
    if fakes is not None and fakes.statistics and not len(fakes) and reals.statistics:  # nothing that a network would be needed for
        missing |= {n: "these are statistics, no images" for n in ("inception_score", "inception_score_deviation", "precision", "recall")}
        return {"fid": frechet_distance(*reals.statistics.values(), *fakes.statistics.values())}
    network = attempt(lambda: Inception(options.inception).to(options.device), options.inception, missing,
                      "fid", "inception_score", "inception_score_deviation", "precision", "recall")

    every = 1 if options.real else max(1, math.ceil(len(reals) / 10_000))
    if every > 1:
        say(f"precision, recall and neighbours: by every {every}th of the real images")
    real = reference(reals, network, options, every) if network else {}
    if fakes is not None:
        shown = first_of(fakes) if len(fakes) else None
        fake = features_of(fakes, network, options, every=1) if network and len(fakes) else {}
        fake |= fakes.statistics
    else:
        labels, features, shown = labels if network else labels[:10], Features(network, every=1), []
        for numbers, painted in progress(generate(gpt, tokenizer, labels, shares(len(labels), options.batch_size), options), "sampling", len(labels)):
            painted = to_uint8(painted)
            shown += [(torch.tensor([n]), image[None].cpu()) for n, image in zip(numbers, painted) if n < 10]
            features.add(numbers, painted) if network else None
        fake, (shown,) = features.finish() if network else {}, in_order(shown) or [None]
    if rank():
        return {}
    torch.set_num_threads(os.cpu_count() or 1)  # torchrun leaves each process one; the others have done their part
    if network:
        figures["fid"] = frechet_distance(real["mu"], real["sigma"], fake["mu"], fake["sigma"])
        lacking = next((n for n, x in ((reals.name, real), (name, fake)) if "features" not in x), None)
        try:
            require(not lacking, f"{lacking} holds statistics, no images")
            device = options.device if options.device.type == "cuda" else "cpu"  # of others, not all know float64
            figures["precision"], figures["recall"] = precision_recall(*(torch.as_tensor(x["features"], device=device) for x in (real, fake)))
        except UserError as error:
            missing |= {n: str(error) for n in ("precision", "recall")}
        if "logits" in fake:
            figures["inception_score"], figures["inception_score_deviation"] = inception_score(fake["logits"])
        else:
            missing |= {n: f"{name} holds statistics, no images" for n in ("inception_score", "inception_score_deviation")}
    if shown is not None and len(reals):
        neighbours(options, path, shown, reals, every, fake.get("features"), real.get("features"))
    return figures


def neighbours(options, path, shown, reals, every, fake, real):
    """A picture: samples, and below each the three real images nearest to it, in the network's features or, for want of them, in pixels."""
    if fake is None or real is None:
        say("nearest neighbours: by their pixels at 16x16, for want of the network's features")
        fake = F.adaptive_avg_pool2d(shown.float(), 16).flatten(1)
        real = torch.stack([F.adaptive_avg_pool2d(reals[i][1].float(), 16).flatten() for i in range(0, len(reals), every)])
    distance = torch.cdist(torch.as_tensor(fake[:len(shown)]), torch.as_tensor(real))
    nearest = distance.topk(min(3, len(real)), largest=False).indices
    rows = [("sample", shown)] + [(name, torch.stack([F.interpolate(reals[int(i) * every][1][None].float(), shown.shape[2:])[0] for i in column]))
                                  for name, column in zip(("nearest real", "second", "third"), nearest.T)]
    draw(options, path, save_grid, [(name, from_uint8(images)) for name, images in rows], suffix="_neighbours")


def save_maps(path, tokenizer, seen, side=640, tile=18, most=2000):
    """
    A map of each sub-codebook: its codes at their two principal components, as the mean of the image patches they stand for, of the most
    chosen ones; nearest to the eye the most chosen. seen (k, V, 3*d*d + 1): the patches added up, and their number.
    """
    sheet, d = Image.new("RGB", (len(seen) * (side + tile) + tile, side + 2 * tile), "white"), tokenizer.config.downsample
    for i, (branch, total) in enumerate(zip(tokenizer.branches, seen)):
        codes = F.normalize(branch.quantizer.codebook.detach().float().cpu(), dim=1)
        number = total[:, -1]
        chosen = [j for j in number.argsort().tolist() if number[j]][-most:]
        patches = to_uint8(F.pixel_shuffle((total[chosen, :-1] / number[chosen, None])[:, :, None, None], d)).permute(0, 2, 3, 1).numpy()
        codes = codes[chosen] - codes[chosen].mean(0)
        places = F.pad(codes @ torch.linalg.svd(codes, full_matrices=False).Vh.T, (0, 2))[:, :2]  # zeros, where there are fewer than two
        places = (places - places.amin(0)) / (places.amax(0) - places.amin(0)).clamp(min=1e-6) * (side - tile) + tile
        for patch, (x, y) in zip(patches, places.tolist()):
            sheet.paste(Image.fromarray(patch).resize((tile, tile), Image.Resampling.NEAREST), (round(x) + i * (side + tile), round(y)))
        ImageDraw.Draw(sheet).text((i * (side + tile) + tile, 2), f"sub-codebook {i + 1}", fill="black", font=ImageFont.load_default(13))
    sheet.save(path)


def draw(options, path, save, *contents, suffix=""):
    path = Path(options.out or path.parent / "evaluate.png")
    path = path.with_stem(path.stem + suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, *contents)
        say(f"picture: {path}")
    except (OSError, ValueError) as error:
        say(f"no picture: {path} cannot be written ({error})")


# -----------------------------------------------------------------------------
# Report

FORMATS = {"psnr": "{:.2f} dB", "ssim": "{:.4f}", "lpips": "{:.4f}", "rfid": "{:.2f}", "fid": "{:.2f}", "inception_score": "{:.2f}",
           "inception_score_deviation": "{:.2f}", "precision": "{:.4f}", "recall": "{:.4f}"}
EACH = {"usage": ("codes used", "{:.1%}"), "perplexity": ("perplexity", "{:.1f}"), "probe": ("linear probe", "{:.1%}")}


def report(figures, missing):
    """Prints a line a figure, and a table of what there is one of for each sub-codebook."""
    for name, form in FORMATS.items():
        if name in figures or name in missing:
            say(f"{name.replace('_', ' '):22s}" + (form.format(figures[name]) if name in figures else "n/a"))
    k = sum(name.startswith("usage_") for name in figures)
    if k:
        say(f"{'sub-codebook':18s}" + "".join(f"{i + 1:10d}" for i in range(k)))
    for name, (words, form) in EACH.items() if k else ():
        say(f"{words:18s}" + "".join(f"{form.format(figures[f'{name}_{i + 1}']) if f'{name}_{i + 1}' in figures else 'n/a':>10s}" for i in range(k)))
    for i, j in itertools.combinations(range(1, k + 1), 2):
        name = f"mutual_information_{i}_{j}"
        say(f"sub-codebooks {i} and {j} share {figures[name]:.2f} bits; as many independent codes would seem to share {figures[name + '_by_chance']:.2f}")
    for reason in dict.fromkeys(missing.values()):
        say(f"n/a: {', '.join(n.replace('_', ' ') for n in missing if missing[n] == reason)}: {reason}")


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--tokenizer", help="a tokenizer's checkpoint (default: out/tokenizer.pt); with --gpt, in place of the one that the GPT's holds")
    add("--gpt", help="a GPT's checkpoint: its samples are measured")
    add("--real", help="real images to measure against: a folder, or an .npz as ADM's (default with --gpt: the training images)")
    add("--fake", help="a folder or an .npz: measured against --real")
    add("--data", help="`shapes`, a folder, or a torchvision name (default: what the checkpoint was trained on)")
    add("--n", "--count", type=int, help="images: held-out ones, drawn at random (default: all), for the probe five times as many training ones (at most "
        "10000); or samples (default: 5000); under torchrun, which takes --n for one of its own flags, write --count")
    add("--out", help="the picture of reconstructions; _codes is added to the name for the maps, _neighbours for samples and the real images "
        "nearest to them (default: evaluate.png beside the checkpoint, or in out/)")
    add("--json", metavar="FILE", help="write the figures there too")
    add("--inception", metavar="FILE", help="the FID network's weights (default: fetched once)")
    add("--vgg", metavar="FILE", help="VGG-16's weights, for LPIPS (default: fetched once)")
    add("--lpips", metavar="FILE", help="the weights of LPIPS v0.1's linear layers (default: fetched once)")
    options = parse_knobs(parser)
    require((not options.fake or options.real and not options.gpt) and (not options.real or options.fake or options.gpt),
            "--real and --fake go together, or --real with --gpt")
    require(not options.fake or not (options.n or options.data or options.tokenizer),
            "--n, --data and --tokenizer say nothing of --real and --fake, which are taken whole")
    require(not options.out or Path(options.out).suffix.lower() in Folder.suffixes, f"--out {options.out}: name a picture, such as evaluate.png")
    require(not options.json or Path(options.json).resolve().parent.is_dir(), f"--json {options.json}: there is no folder {os.path.dirname(options.json or '')}")
    began, missing = time.time(), {}
    options.device, _, _ = start(options.device, options.seed)
    torch.backends.cudnn.allow_tf32 = False  # or the figures differ from one machine to another
    if options.gpt or options.fake:
        figures = generation(options, missing)
    else:
        options.tokenizer = options.tokenizer or "out/tokenizer.pt"
        figures = reconstruction(options, missing)
    report(figures, missing)
    if options.json and rank() == 0:
        with explained(f"cannot write {options.json}"):
            Path(options.json).write_text(json.dumps(figures | {name: None for name in missing} | {"missing": missing}, indent=1))
    say(f"{duration(time.time() - began)}")


if __name__ == "__main__":
    cli(main)
