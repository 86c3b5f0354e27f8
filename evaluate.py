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

import hashlib
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

from fqgan import LPIPS, Folder, UserError, fetch, load_data, load_tokenizer, read_weights, to_uint8, upright_rgb
from sample import add_knobs, generate, load_generator
from train_tokenizer import Parser, cli, duration, fixed_draw, per_code, psnr, reconstruction_rows, save_grid, start, usage

# -----------------------------------------------------------------------------
# Metrics


def ssim(images, others):
    """
    (B,3,H,W) in [-1,1] twice, at least 7x7 -> (B,) structural similarity of the images as 8-bit files hold them: 7x7 windows
    of equal weights inside the image, sample covariance, mean over channels, data range 255.
    """
    if min(images.shape[-2:]) < 7:
        raise UserError(f"images are {images.shape[-1]}x{images.shape[-2]}; SSIM's window is 7x7")
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
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != mu1.shape * 2:
        raise UserError(f"statistics of other shapes: {mu1.shape}, {sigma1.shape} and {mu2.shape}, {sigma2.shape}")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise UserError("statistics that are not finite")
    values, vectors = scipy.linalg.eigh(sigma1)
    root = vectors * np.sqrt(values.clip(0))
    product = scipy.linalg.eigvalsh(root.T @ sigma2 @ root)
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(product.clip(0)).sum())


def inception_score(logits, split_size=5000):
    """logits (N, classes) -> (mean, deviation) over runs of split_size of exp(mean KL(p(y|x) || p(y))); the last run may be shorter."""
    if not len(logits):
        raise UserError("no images to take the Inception Score of")
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
    if min(len(real), len(fake)) <= k:
        raise UserError(f"precision and recall need more than {k} images in both sets; there are {len(real)} and {len(fake)}")

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


def gather(item):
    """What each rank gives, as a list, on every rank."""
    every = [item] * world()
    if world() > 1:
        dist.all_gather_object(every, item)
    return every


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


class FolderImages(Folder):
    def __init__(self, path):
        super().__init__(path)
        self.size = upright_rgb(super().__getitem__(0)[0]).size

    def __getitem__(self, index):
        name = self.samples[index][0]
        try:
            image = upright_rgb(super().__getitem__(index)[0])
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{str(name)!r} cannot be read ({error}): mend or remove it") from None
        if image.size != self.size:
            raise UserError(f"{str(name)!r} is {image.width}x{image.height}, the first of its set {self.size[0]}x{self.size[1]}: all must have one size")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), 0


class ArrayImages:
    def __init__(self, array):
        self.array = array

    def __len__(self):
        return len(self.array)

    def __getitem__(self, index):
        return torch.from_numpy(np.array(self.array[index])).permute(2, 0, 1), 0


class DataImages:
    """The images of one of load_data's sets that `indices` name, with their labels, center-cropped."""

    def __init__(self, data, indices):
        self.data, self.indices = data, indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, number):
        image, label = self.data.view(self.indices[number])
        return to_uint8(image), label


class ImageSet(torch.utils.data.Dataset):
    """
    Items are (number, image, label). `files` hold all that makes the set what it is, else its name does; `place` is where its statistics
    are kept, less an ending; `statistics`: (mu, sigma), where a file brings its own.
    """

    def __init__(self, name, images, files, place, statistics=None):
        self.name, self.images, self.files, self.place, self.statistics = name, images, files, place, statistics

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        return number, *self.images[number]

    def batches(self, size):
        """This rank's share: (numbers, images uint8 (B,3,H,W), labels)"""
        workers = min(8, (os.cpu_count() or 1) // world()) if len(self.files) > 1000 else 0
        return torch.utils.data.DataLoader(self, batch_sampler=shares(len(self), size), num_workers=workers)

    def digest(self):
        digest = hashlib.sha256(f"{self.images[0][0].shape} {len(self)} {'' if self.files else self.name}".encode())
        for path in self.files:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest


def part_of(data, indices):
    """The ImageSet of the images of one of load_data's sets that `indices` name."""
    files = [Path(data.source.samples[i][0]) for i in indices] if isinstance(data.source, Folder) else []
    place = Path(os.path.commonpath([p.parent for p in files])) if files else Path(torch.hub.get_dir()) / "statistics" / "set"
    return ImageSet(f"{len(indices)} images of {data.origin}", DataImages(data, indices), files, place)


def open_set(path):
    """The ImageSet of a folder, or of an .npz as ADM's: images arr_0, statistics mu and sigma, or both. UserError for anything else."""
    path = Path(path)
    if path.is_dir():
        images = FolderImages(path)
        return ImageSet(str(path), images, [p for p, _ in images.samples], path.resolve())
    if not path.is_file() or path.suffix != ".npz":
        raise UserError(f"{path}: " + ("no such file or folder" if not path.exists() else
                                       "give a folder of images, or an .npz of images (arr_0) or statistics (mu, sigma)"))
    array, statistics = np.empty((0, 1, 1, 3), np.uint8), None
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = sorted(file.files)
            if {"mu", "sigma"} <= set(keys):
                statistics = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
            elif "arr_0" not in keys:
                raise UserError(f"{path} holds {', '.join(keys) or 'nothing'}; expected arr_0 (images), or mu and sigma (statistics)")
        if "arr_0" in keys:
            array = map_array(path, "arr_0.npy")
    except UserError:
        raise
    except (OSError, ValueError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:160]}") from None
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise UserError(f"{path}: arr_0 is {array.dtype} {array.shape}; expected uint8 (N, height, width, 3)")
    return ImageSet(str(path), ArrayImages(array), [path], path.resolve(), statistics)


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
        """-> arrays of all ranks' images together: mu (2048), sigma (2048,2048), and in the set's order features and logits, if kept"""
        n, total, outer = (sum(parts) for parts in zip(*gather((self.n, self.sum, self.outer))))
        if n < 2:
            raise UserError(f"{n} image has no covariance: 2 are needed, and thousands for a FID that means something")
        result = {"mu": total / n, "sigma": (outer - torch.outer(total, total) / n) / (n - 1)}
        if self.every:
            result["features"], result["logits"] = in_order(self.kept)
        return {name: value.numpy() for name, value in result.items()}


def in_order(parts):
    """Batches of (numbers, x, y, ...) from all ranks -> x, y, ..., whole and in the order of the numbers."""
    numbers, *columns = (torch.cat(c) for c in zip(*(part for parts in gather(parts) for part in parts)))
    return [column[numbers.argsort()] for column in columns]


def features_of(images, network, options, every=0):
    """Features.finish() of an ImageSet."""
    features = Features(network, every)
    for numbers, batch, _ in progress(images.batches(options.batch_size), f"features of {images.name}", len(images)):
        features.add(numbers, batch.to(options.device))
    return features.finish()


def reference(images, network, options, every=0):
    """features_of a set of real images, kept in a file beside the set under a name made of its content, and taken from there the next time."""
    if not len(images) or images.statistics and not every:
        return dict(zip(("mu", "sigma"), images.statistics))
    path, known = None, None
    if rank() == 0:
        digest = images.digest()
        digest.update(network.last.detach().cpu().numpy().tobytes() + f"{every}".encode())
        path = images.place.with_name(f"{images.place.name}.{digest.hexdigest()[:12]}.npz")
        try:
            with np.load(path, allow_pickle=False) as file:
                known = dict(file)
            say(f"features of {images.name}: from {path}")
        except FileNotFoundError:
            pass
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            say(f"{path} cannot be read ({error}): made again")
    known = gather(known)[0]
    if known is None:
        known = features_of(images, network, options, every)
        try:
            if rank() == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(f".{path.name}")
                np.savez(temporary, **known)
                temporary.replace(path)
        except OSError as error:
            say(f"{path} cannot be written ({error.strerror}): the features of {images.name} are not kept for the next time")
    return known | (dict(zip(("mu", "sigma"), images.statistics)) if images.statistics else {})


# -----------------------------------------------------------------------------
# What is measured


def attempt(make, missing, *names):
    """make(); or None on all ranks, where weights cannot be had on one: then `missing` says why, for each of `names`."""
    try:
        made, reason = make(), None
    except UserError as error:
        made, reason = None, str(error)
    reason = next((r for r in gather(reason) if r), None)
    missing.update({name: reason for name in names} if reason else {})
    return None if reason else made


def codes_of(images, tokenizer, options, what, use=lambda *_: ()):
    """
    An ImageSet -> labels (n), ids (n,k,h,w), and whatever `use` makes of (numbers, images in [-1,1], reconstructions), a tuple of tensors.
    """
    parts, kind = [], torch.int16 if tokenizer.config.codebook_size <= 2**15 else torch.int32
    for numbers, batch, labels in progress(images.batches(options.batch_size), what, len(images)):
        batch = batch.to(options.device).float() / 127.5 - 1
        ids = tokenizer.encode(batch)
        parts.append((numbers, labels, ids.to(kind).cpu(), *use(numbers, batch, ids)))
    return in_order(parts)


@torch.no_grad()
def reconstruction(options, missing):
    """The figures of a tokenizer, and a picture."""
    path = Path(options.tokenizer)
    tokenizer = load_tokenizer(path, options.device)
    c, rng = tokenizer.config, np.random.default_rng(0)
    train, held_out = (load_data(data_name(options, tokenizer, path), c.image_size, part) for part in (True, False))
    images = part_of(held_out, fixed_draw(held_out)[:options.n])
    say(f"{path}: k={c.k} sub-codebooks of {c.codebook_size} codes; {images.name}")
    network = attempt(lambda: Inception(options.inception).to(options.device), missing, "rfid")
    lpips = attempt(lambda: LPIPS(options.vgg, options.lpips).to(options.device), missing, "lpips")
    real = reference(images, network, options) if network else None
    fakes = Features(network) if network else None

    def compare(numbers, batch, ids):
        painted = tokenizer.decode(ids)
        if fakes:
            fakes.add(numbers, to_uint8(painted))
        metrics = [psnr, ssim] + ([lpips] if lpips else [])
        return [metric(batch, painted).double().cpu() for metric in metrics]

    labels, ids, *scores = codes_of(images, tokenizer, options, "reconstructing", compare)
    figures = {name: float(score.mean()) for name, score in zip(("psnr", "ssim", "lpips"), scores)}
    if fakes:
        fake = fakes.finish()
        figures["rfid"] = frechet_distance(real["mu"], real["sigma"], fake["mu"], fake["sigma"])
    counts = torch.stack([torch.bincount(ids[:, i].flatten().long(), minlength=c.codebook_size) for i in range(c.k)])
    for name, values in zip(("usage", "perplexity"), usage(counts)):
        figures |= per_code(name, values)

    names = [f"probe_{i + 1}" for i in range(c.k)]
    if len(held_out.classes) < 2:
        missing.update({n: "the data has no classes" for n in names})
    else:
        taught_labels, taught = codes_of(part_of(train, fixed_draw(train)[:10_000]), tokenizer, options, "codes for the probe")
        for i, name in enumerate(names):
            vectors = [tokenizer.branches[i].quantizer.lookup(x[:, i].long().to(options.device)).flatten(1).cpu() for x in (taught, ids)]
            figures[name] = linear_probe(vectors[0], taught_labels, vectors[1], labels)
    for i in range(c.k):
        for j in range(i + 1, c.k):
            a, b = (ids[:, n].flatten().numpy() for n in (i, j))
            figures[f"mutual_information_{i + 1}_{j + 1}"] = mutual_information(a, b)
            figures[f"mutual_information_{i + 1}_{j + 1}_by_chance"] = mutual_information(a, rng.permutation(b))
    if rank() == 0:
        picture = torch.stack([images[i][1] for i in range(min(10, len(images)))]).to(options.device).float() / 127.5 - 1
        draw(options, path, reconstruction_rows(tokenizer, picture))
    return figures


@torch.no_grad()
def generation(options, missing):
    """The figures of a GPT's samples, or of any set of images, and a picture of nearest neighbours."""
    if options.gpt:
        path = Path(options.gpt)
        gpt, tokenizer, classes = load_generator(path, options.tokenizer, options.device)
        data = None if options.real else load_data(data_name(options, gpt, path), tokenizer.config.image_size, True)
        labels = torch.arange(options.n or 5000) % len(classes)
        name = f"{len(labels)} samples of {path}"
    else:
        path, fakes = Path("out/evaluate.png"), open_set(options.fake)
        name = f"{fakes.name} ({len(fakes)} images)"
    reals = open_set(options.real) if options.real else part_of(data, fixed_draw(data))
    say(f"{name} against {reals.name}" + (f" ({len(reals)} images)" if options.real and len(reals) else ""))
    network = attempt(lambda: Inception(options.inception).to(options.device), missing, "fid", "inception_score", "precision", "recall")

    every = max(1, math.ceil(len(reals) / 10_000))  # for precision and recall, ADM's reference batch too is of 10,000
    shown, figures = [], {}
    if options.gpt:
        labels = labels if network else labels[:10]
        features = Features(network, every=1) if network else None
        for numbers, painted in progress(generate(gpt, tokenizer, labels, shares(len(labels), options.batch_size), options), "sampling", len(labels)):
            painted = to_uint8(painted)
            shown.append((torch.as_tensor(numbers), painted.cpu())) if numbers[0] < 10 else None
            if features:
                features.add(numbers, painted)
        shown = in_order(shown)[0][:10]
        fake = features.finish() if features else {}
    else:
        shown = torch.stack([fakes[i][1] for i in range(min(10, len(fakes)))]) if len(fakes) else None
        fake = (features_of(fakes, network, options, every=1) if len(fakes) else dict(zip(("mu", "sigma"), fakes.statistics))) if network else {}
    real = reference(reals, network, options, every) if network else {}
    if network:
        figures["fid"] = frechet_distance(real["mu"], real["sigma"], fake["mu"], fake["sigma"])
        lacking = [s for s, x in ((reals.name, real), (name, fake)) if "features" not in x]
        if "logits" in fake:
            figures["inception_score"], figures["inception_score_deviation"] = inception_score(fake["logits"])
        else:
            missing["inception_score"] = f"{name} holds statistics, no images"
        if lacking:
            missing.update({n: f"{lacking[0]} holds statistics, no images" for n in ("precision", "recall")})
        else:
            figures["precision"], figures["recall"] = precision_recall(real["features"], fake["features"])
    if rank() == 0 and shown is not None and len(reals):
        neighbours(options, path, shown, reals, every, fake.get("features"), real.get("features"))
    return figures


def neighbours(options, path, shown, reals, every, fake, real):
    """A picture: samples, and below each the three real images nearest to it, in the network's features or, without it, in pixels."""
    if fake is None or real is None:
        say("nearest neighbours: by pixels, for want of the network")
        real = np.stack([reals[i][1].flatten().numpy() for i in range(0, len(reals), every)])
        fake = shown.flatten(1).numpy()
        if fake.shape[1] != real.shape[1]:
            return say("no picture of nearest neighbours: samples and real images differ in size")
    nearest = torch.cdist(torch.from_numpy(fake[:len(shown)]).double(), torch.from_numpy(real).double()).topk(min(3, len(real)), largest=False).indices
    rows = [("sample", shown)] + [(name, torch.stack([reals[int(i) * every][1] for i in nearest[:, r]]))
                                  for r, name in zip(range(nearest.shape[1]), ("nearest real", "second", "third"))]
    draw(options, path, [(name, images.float() / 127.5 - 1) for name, images in rows])


def draw(options, path, rows):
    path = Path(options.out or path.parent / "evaluate.png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_grid(path, rows)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {error}") from None
    say(f"picture: {path}")


def data_name(options, model, path):
    if not (options.data or model.trained_on):
        raise UserError(f"{path} does not say what it was trained on: name the images with --data")
    return options.data or model.trained_on


# -----------------------------------------------------------------------------
# Report

FORMATS = {"psnr": "{:.2f} dB", "ssim": "{:.4f}", "lpips": "{:.4f}", "rfid": "{:.2f}", "fid": "{:.2f}", "inception_score": "{:.2f}",
           "inception_score_deviation": "{:.2f}", "precision": "{:.4f}", "recall": "{:.4f}", "usage": "{:.1%}", "perplexity": "{:.1f}",
           "probe": "{:.1%}", "mutual": "{:.3f} bits"}


def report(figures, missing):
    for name, value in figures.items():
        words = name.replace("inception_score", "Inception Score").replace("_", " ")
        say(f"{words:36s} {FORMATS.get(name, FORMATS.get(name.split('_')[0])).format(value)}")
    for reason in dict.fromkeys(missing.values()):
        say(f"{', '.join(n for n in missing if missing[n] == reason):36s} n/a: {reason}")


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--tokenizer", help="a tokenizer's checkpoint (default: out/tokenizer.pt); with --gpt, in place of the one that the GPT's holds")
    add("--gpt", help="a GPT's checkpoint: its samples are measured")
    add("--real", help="real images to measure against: a folder, or an .npz as ADM's (default with --gpt: the training images)")
    add("--fake", help="a folder or an .npz: measured against --real")
    add("--data", help="`shapes`, a folder, or a torchvision name (default: what the checkpoint was trained on)")
    add("--n", "--count", type=int, help="images: held-out ones, drawn at random (default: all), or samples (default: 5000); under torchrun, "
        "which takes --n for one of its own flags, write --count")
    add("--out", help="the picture (default: evaluate.png beside the checkpoint)")
    add("--json", metavar="FILE", help="write the figures there too")
    add("--inception", metavar="FILE", help="the FID network's weights (default: fetched once)")
    add("--vgg", metavar="FILE", help="VGG-16's weights, for LPIPS (default: fetched once)")
    add("--lpips", metavar="FILE", help="the weights of LPIPS v0.1's linear layers (default: fetched once)")
    add_knobs(parser)
    options = parser.parse_args()
    if bool(options.fake) and not options.real or options.real and not (options.fake or options.gpt) or options.fake and options.gpt:
        raise UserError("--real and --fake go together, or --real with --gpt")
    if options.n is not None and options.n < 1 or options.batch_size < 1:
        raise UserError("--n and --batch-size must be at least 1")
    began, missing = time.time(), {}
    options.device, _, _ = start(options.device, options.seed)
    if options.gpt or options.fake:
        figures = generation(options, missing)
    else:
        options.tokenizer = options.tokenizer or "out/tokenizer.pt"
        figures = reconstruction(options, missing)
    report(figures, missing)
    if options.json and rank() == 0:
        try:
            Path(options.json).write_text(json.dumps(figures | {name: None for name in missing} | {"missing": missing}, indent=1))
        except OSError as error:
            raise UserError(f"cannot write {options.json}: {error.strerror}") from None
    say(f"{duration(time.time() - began)}")


if __name__ == "__main__":
    cli(main)
