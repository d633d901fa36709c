import itertools
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.checkpoints.mask_vae import load_mask_vae, save_mask_vae
from paligemma_jax.errors import CheckpointError
from paligemma_jax.models import mask_vae
from paligemma_jax.models.mask_vae import MaskVAE, MaskVAEConfig
from tests.formulas import MaskFormulas

SMALL = MaskVAEConfig(encoder_widths=(3, 5, 6, 8), decoder_widths=(9, 7, 6, 4, 5), code_width=10, num_codes=12)


@pytest.fixture(scope="module")
def params():
    return mask_vae.init_params(jax.random.key(0, impl="rbg"), SMALL)  # compiles in a sixth of the time


@pytest.fixture(scope="module")
def masks():
    return (np.random.default_rng(0).random((3, 64, 64)) > 0.5).astype(np.float32)


def test_full_size_has_the_parameters_of_the_published_file():
    tree = jax.eval_shape(lambda: mask_vae.init_params(jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == 2_050_929
    assert MaskVAEConfig.from_params(tree) == MaskVAEConfig()


def test_sizes_come_from_the_parameters(params, masks):
    assert MaskVAEConfig.from_params(params) == SMALL
    codes = mask_vae.encode(params, masks)
    assert codes.shape == (3, 16) and codes.dtype == jnp.int32
    assert mask_vae.decode(params, codes).shape == (3, 64, 64)


def test_codes_are_the_nearest_rows_in_row_major_order(params, masks):
    vectors = np.asarray(MaskVAE(SMALL).apply({"params": params}, masks, method="embed")).reshape(3, 16, 10)
    distances = np.square(vectors[:, :, None] - np.asarray(params["codebook"])).sum(-1)
    np.testing.assert_array_equal(mask_vae.encode(params, masks), distances.argmin(-1))


def test_each_code_shapes_its_own_cell(params):
    """Without the residual blocks' reach, code (1, 2) of the grid shows only within 15 pixels of its cell."""
    local = jax.tree.map_with_path(lambda path, x: x * 0 if "res_" in str(path) else x, params)
    codes = np.zeros((2, 16), np.int32)
    codes[1, 1 * 4 + 2] = 5
    plain, changed = np.asarray(mask_vae.decode(local, codes))
    rows, columns = np.nonzero(plain != changed)
    assert 1 <= rows.min() < 16 and 31 < rows.max() < 47
    assert 17 <= columns.min() < 32 and 47 < columns.max() < 63


def test_batch_equals_singles(params, masks):
    codes = mask_vae.encode(params, masks)
    together = mask_vae.decode(params, codes)
    for i in range(3):
        np.testing.assert_array_equal(mask_vae.encode(params, masks[i : i + 1]), codes[i : i + 1])
        np.testing.assert_allclose(mask_vae.decode(params, codes[i : i + 1]), together[i : i + 1], atol=1e-6)


def test_training_pass_decodes_the_codes_and_lets_gradients_straight_through(params, masks):
    model = MaskVAE(SMALL)
    run = jax.jit(lambda p: model.apply({"params": p}, masks))
    output, vectors, codes = run(params)
    np.testing.assert_array_equal(codes.reshape(3, 16), mask_vae.encode(params, masks))
    np.testing.assert_allclose(output, mask_vae.decode(params, codes.reshape(3, 16)), atol=1e-5)
    assert vectors.shape == (3, 4, 4, 10)

    gradients = jax.jit(jax.grad(lambda p: jnp.mean(run(p)[0] ** 2)))(params)
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(gradients["encoder"]["down_0"]))
    assert not np.any(np.asarray(gradients["codebook"]))


def test_it_is_that_of_the_formulas(tmp_path):
    """From a file by hand: with biases, which `init_params` leaves at zero, and kernels without any symmetry."""
    rng, arrays = np.random.default_rng(0), {}
    enter, leave, width = SMALL.encoder_widths, SMALL.decoder_widths, SMALL.code_width
    kernels = {f"encoder.{2 * i}": (b, a, 4, 4) for i, (a, b) in enumerate(itertools.pairwise((1, *enter)))}
    kernels |= {f"decoder.{4 + 2 * i}": (a, b, 4, 4) for i, (a, b) in enumerate(itertools.pairwise(leave))}
    for stem, channels in (("encoder.8", enter[-1]), ("encoder.9", enter[-1]), ("decoder.2", 9), ("decoder.3", 9)):
        kernels |= {f"{stem}.net.{2 * i}": (channels, channels, size, size) for i, size in enumerate((3, 3, 1))}
    kernels |= {"encoder.10": (width, enter[-1], 1, 1), "decoder.0": (leave[0], width, 1, 1)}
    kernels["decoder.12"] = (1, leave[-1], 1, 1)
    for name, shape in kernels.items():
        outputs = shape[1] if name in ("decoder.4", "decoder.6", "decoder.8", "decoder.10") else shape[0]
        arrays[f"{name}.weight"] = rng.normal(size=shape) * 2 * np.prod(shape[1:]) ** -0.5
        arrays[f"{name}.bias"] = rng.normal(size=outputs) * 0.3
    arrays["_vq_vae._embedding"] = rng.normal(size=(SMALL.num_codes, width))
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    np.savez(tmp_path / "vae.npz", **arrays)
    params, formulas = load_mask_vae(tmp_path / "vae.npz"), MaskFormulas(arrays)
    masks = np.zeros((3, 64, 64), np.float32)
    masks[0, 5:40, 10:60], masks[1, 30:, :20], masks[2] = 1, 0.75, rng.random((64, 64))
    codes = rng.integers(0, SMALL.num_codes, (3, 16), np.int32)
    np.testing.assert_array_equal(mask_vae.encode(params, masks), [formulas.encode(mask) for mask in masks])
    decoded = np.stack([formulas.decode(row) for row in codes])
    np.testing.assert_allclose(mask_vae.decode(params, codes), decoded, atol=1e-4)
    assert decoded.std() > 0.05, "masks this even would hide a mistake"


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_file_round_trip(params, tmp_path, dtype):
    path = tmp_path / "vae.npz"
    save_mask_vae(path, params, dtype)
    loaded = load_mask_vae(path)
    stored = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params)
    jax.tree.map(np.testing.assert_array_equal, loaded, dict(stored))
    save_mask_vae(tmp_path / "again.npz", loaded, dtype)
    first, second = np.load(path), np.load(tmp_path / "again.npz")
    assert first.files == second.files and all(first[k].tobytes() == second[k].tobytes() for k in first.files)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.npz", "vae.npz"]


def test_file_has_torch_names_and_shapes(params, tmp_path):
    save_mask_vae(tmp_path / "vae.npz", params)
    with np.load(tmp_path / "vae.npz") as file:
        shapes = {name: file[name].shape for name in file.files}
    assert len(shapes) == 1 + 2 * (4 + 6 + 1 + 1 + 6 + 4 + 1)
    assert shapes["_vq_vae._embedding"] == (12, 10)
    assert shapes["encoder.2.weight"] == (5, 3, 4, 4)
    assert shapes["encoder.9.net.4.weight"] == (8, 8, 1, 1)
    assert shapes["decoder.6.weight"] == (7, 6, 4, 4)  # transposed: [in, out, height, width]
    assert shapes["decoder.12.bias"] == (1,)


def test_training_leftovers_in_the_file_are_ignored(params, tmp_path):
    rewrite(
        tmp_path, params, lambda a: a | {"_vq_vae._ema_w": np.zeros((12, 10)), "_vq_vae._ema_cluster_size": np.ones(12)}
    )
    assert MaskVAEConfig.from_params(load_mask_vae(tmp_path / "vae.npz")) == SMALL


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda a: {k: v for k, v in a.items() if k != "decoder.6.weight"}, "1 missing: decoder.6.weight"),
        (
            lambda a: {k: v for k, v in a.items() if not k.startswith("encoder.10")},
            "encoder.10.weight, encoder.10.bias",
        ),
        (lambda a: a | {"decoder.13.bias": np.ones(1)}, "1 unexpected: decoder.13.bias"),
        (lambda a: a | {"encoder.8.net.0.weight": np.ones((8, 8, 5, 5))}, "is [8, 8, 5, 5] instead of [8, 8, 3, 3]"),
        (lambda a: a | {"_vq_vae._embedding": np.ones(7)}, "_vq_vae._embedding is [7]"),
        (lambda a: a | {"decoder.0.bias": np.full(9, np.nan)}, "decoder.0.bias"),
        (lambda a: a | {"decoder.0.bias": np.array(["a"] * 9)}, "decoder.0.bias"),
        (lambda a: {}, "missing: _vq_vae._embedding"),
        (lambda a: a | {"decoder.0.bias": np.array([None] * 9)}, "not a readable .npz"),
    ],
)
def test_unfit_files_are_named_in_one_line(params, tmp_path, change, told):
    rewrite(tmp_path, params, change)
    assert told in error_of(tmp_path / "vae.npz")


def test_damaged_files(params, tmp_path):
    path = tmp_path / "vae.npz"
    save_mask_vae(path, params)
    content = path.read_bytes()
    assert "missing" in error_of(tmp_path / "absent.npz")
    damages = [b"", b"not a zip", content[: len(content) // 2], content[:2000] + b"\xff" * 64 + content[2064:]]
    for damage in damages:
        path.write_bytes(damage)
        assert "not a readable .npz" in error_of(path)
    np.save(tmp_path / "one.npy", np.ones(3))
    assert "not a readable .npz" in error_of(tmp_path / "one.npy")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "hello")
    assert "not a mask VQ-VAE" in error_of(path)


def rewrite(folder, params, change):
    """Saves `params` as vae.npz in `folder`, its arrays changed."""
    path = folder / "vae.npz"
    save_mask_vae(path, params)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(path, **change(arrays))


def error_of(path):
    with pytest.raises(CheckpointError) as caught:
        load_mask_vae(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.mark.oracle
@pytest.mark.parametrize("config", [MaskVAEConfig(), SMALL], ids=["full", "small"])
def test_equals_torch(config, tmp_path):
    torch = pytest.importorskip("torch")
    nn = torch.nn

    class ResBlock(nn.Module):
        def __init__(self, width):
            super().__init__()
            convs = (
                nn.Conv2d(width, width, 3, padding=1),
                nn.Conv2d(width, width, 3, padding=1),
                nn.Conv2d(width, width, 1),
            )
            self.net = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

        def forward(self, x):
            return x + self.net(x)

    def stack(convs):
        return [layer for conv in convs for layer in (conv, nn.ReLU())]

    def pairs(widths):
        return itertools.pairwise(widths)

    enter, leave = config.encoder_widths, config.decoder_widths
    encoder = nn.Sequential(
        *stack(nn.Conv2d(a, b, 4, 2, 1) for a, b in pairs((1, *enter))),
        ResBlock(enter[-1]),
        ResBlock(enter[-1]),
        nn.Conv2d(enter[-1], config.code_width, 1),
    )
    decoder = nn.Sequential(
        *stack([nn.Conv2d(config.code_width, leave[0], 1)]),
        ResBlock(leave[0]),
        ResBlock(leave[0]),
        *stack(nn.ConvTranspose2d(a, b, 4, 2, 1) for a, b in pairs(leave)),
        nn.Conv2d(leave[-1], 1, 1),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in [*encoder.named_parameters(), *decoder.named_parameters()]:
            fan_in = value[0].numel() if "weight" in name else 1
            value.copy_(torch.randn(value.shape, generator=generator) * (fan_in**-0.5 if "weight" in name else 0.1))
        codebook = torch.randn((config.num_codes, config.code_width), generator=generator)
        masks = torch.rand((4, 64, 64), generator=generator)
        vectors = encoder(2 * (masks[:, None] - 0.5)).permute(0, 2, 3, 1)
        codes = torch.cdist(vectors.reshape(-1, config.code_width), codebook).argmin(-1).reshape(4, 16)
        decoded = decoder(codebook[codes].reshape(4, 4, 4, -1).permute(0, 3, 1, 2))[:, 0]

    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    state |= {f"decoder.{k}": v for k, v in decoder.state_dict().items()} | {"_vq_vae._embedding": codebook}
    np.savez(tmp_path / "vae.npz", **{name: value.numpy() for name, value in state.items()})
    params = load_mask_vae(tmp_path / "vae.npz")

    ours = MaskVAE(config).apply({"params": params}, masks.numpy(), method="embed")
    np.testing.assert_allclose(ours, vectors.numpy(), atol=1e-5)
    np.testing.assert_array_equal(mask_vae.encode(params, masks.numpy()), codes.numpy())
    np.testing.assert_allclose(mask_vae.decode(params, codes.numpy()), decoded.numpy(), atol=1e-5)
