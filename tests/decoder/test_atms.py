"""The ATMS encoder against the published code's numbers, its traps kept and mended, the decoder."""

from __future__ import annotations

import math

import pytest
import torch
from helpers_golden import assert_golden, atms_shapes, golden_input, golden_state

import ATMS_retrieval
import util
from decoder.atms import ATMS
from decoder.decoder import Decoder
from loss import Contrast, contrastive_total
from modalities import NAMES
from rundirs.tensors import save_tensors
from subject_layers.embedding import positional_table
from subject_layers.subject import SubjectLinear
from unet import PriorBank

C, T, SUBJECTS, D = 8, 100, 3, 64
SIGNAL = {"channels": ["O1", "Oz", "O2"], "subjects": ["sub-01", "sub-08"], "times": [0.0, 0.004]}


def _encoder(seed: int = 0, **changes) -> ATMS:
    torch.manual_seed(seed)
    sizes = {"n_channels": C, "n_times": T, "n_subjects": SUBJECTS, "embed_dim": D}
    return ATMS.from_config(sizes | changes)


def _eeg(rows: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, C, T, generator=torch.Generator().manual_seed(seed))


def _train_subject_layer(encoder: ATMS) -> None:
    """Random subject matrices, in place of the identity that a fresh layer is."""
    torch.nn.init.normal_(encoder.subject_layer.weight, std=0.1)
    torch.nn.init.normal_(encoder.subject_layer.bias, std=0.1)


def _changed_rows(encoder: ATMS, eeg: torch.Tensor, one, other) -> list[bool]:
    a, b = (encoder(eeg, torch.tensor(ids)) for ids in (one, other))
    return [not torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True)]


# --- the published code -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def public_state():
    return golden_state(atms_shapes(), torch.float64)


def test_the_encoder_is_where_the_public_code_has_it():
    assert ATMS_retrieval.ATMS is ATMS


@torch.no_grad()
def _golden_output(model: ATMS) -> torch.Tensor:
    return model(golden_input(0, 1.0, (3, 63, 250), torch.float64), torch.full((3,), 8))


def test_golden_numbers_of_the_published_code(public_state):
    assert len(public_state) == 53
    model = ATMS.from_reference(public_state)
    assert not model.training
    output = _golden_output(model)
    assert output.dtype == torch.float64
    assert_golden(output, "atms_float64_subject8", rtol=1e-6)


def test_float64_parameters_are_loaded_whole(public_state):
    model = ATMS.from_reference(public_state)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, public_state[key], rtol=0, atol=0)


def test_positional_table_can_be_left_out_for_older_checkpoints(public_state):
    with_table = _golden_output(ATMS.from_reference(public_state))
    without = _golden_output(ATMS.from_reference(public_state, positional=False))
    assert (with_table - without).norm() > 0.1 * with_table.norm()


def test_float32_agrees_with_float64(public_state):
    single = {
        key: value.float() if value.is_floating_point() else value
        for key, value in public_state.items()
    }
    model = ATMS.from_reference(single)
    with torch.no_grad():
        output = model(golden_input(0, 1.0, (3, 63, 250), torch.float32), torch.full((3,), 8))
    double = _golden_output(ATMS.from_reference(public_state))
    torch.testing.assert_close(output.double(), double, rtol=1e-3, atol=1e-4)


def test_published_parameter_counts(public_state):
    total = sum(
        value.numel()
        for key, value in public_state.items()
        if value.is_floating_point() and "running_" not in key and not key.endswith(".pe")
    )
    live = sum(p.numel() for p in ATMS.from_reference(public_state).parameters())
    assert total == 3_202_413
    # shared_embedding (250) is alive for sub-10; the rest of the 127,250 dead ones is dropped
    assert total - live == 127_000


@pytest.mark.parametrize(
    "key",
    [
        "proj_eeg.0.weight",
        "proj_eeg.2.bias",
        "encoder.encoder.norm.weight",
        "encoder.enc_embedding.value_embedding.weight",
        "enc_eeg.0.tsconv.5.running_mean",
    ],
)
def test_state_dict_with_a_missing_key_is_refused(public_state, key):
    rest = {name: value for name, value in public_state.items() if name != key}
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        ATMS.from_reference(rest)


def test_state_dict_with_an_unknown_key_is_refused(public_state):
    with pytest.raises(ValueError, match="other_layer"):
        ATMS.from_reference(public_state | {"other_layer.weight": torch.zeros(2, 2)})


def test_other_pooling_is_refused_and_loads_when_named():
    """Public checkpoints with a (1, 5) kernel and proj_eeg.0 (1024, 1840) exist."""
    shapes = atms_shapes()
    shapes |= {"enc_eeg.0.tsconv.0.weight": (40, 1, 1, 5), "proj_eeg.0.weight": (1024, 1840)}
    state = golden_state(shapes, torch.float32)
    with pytest.raises(ValueError, match=r"\(1024, 1840\).*\(1024, 1600\).*pooling"):
        ATMS.from_reference(state)
    model = ATMS.from_reference(state, pool_kernel=17)
    with torch.no_grad():
        output = model(golden_input(0, 1.0, (2, 63, 250), torch.float32), torch.tensor([1, 2]))
    assert output.shape == (2, 1024) and output.isfinite().all()


def test_positional_table_is_the_sinusoid_of_its_definition():
    table = positional_table(5, 6)
    for p, i in ((0, 0), (3, 1), (4, 2)):
        angle = p / 10000 ** (2 * i / 6)
        assert table[p, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert table[p, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert positional_table(5, 7).shape == (5, 7)


# --- the traps, kept for public checkpoints and mended by default -----------------------------


def _influence(encoder: ATMS) -> torch.Tensor:
    """How far each channel alone moves the output: [C]."""
    eeg, subject = _eeg(16), torch.zeros(16, dtype=torch.int64)
    other = _eeg(16, seed=2)
    base, moved = encoder(eeg, subject), []
    for channel in range(C):
        changed = eeg.clone()
        changed[:, channel] = other[:, channel]
        moved.append((encoder(changed, subject) - base).norm())
    return torch.stack(moved)


@torch.no_grad()
def test_reference_drops_the_last_channel_and_the_default_does_not():
    published = _influence(_encoder(reference=True).eval())
    mended = _influence(_encoder().eval())
    assert published[-1] < 0.25 * published[:-1].min()
    assert mended.min() > 0.5 * mended.max()


@torch.no_grad()
def test_reference_id_beyond_the_table_switches_the_whole_batch():
    encoder, eeg = _encoder(reference=True, n_subjects=10).eval(), _eeg(3)
    assert _changed_rows(encoder, eeg, [1, 2, 3], [1, 2, 9]) == [False, False, True]
    assert _changed_rows(encoder, eeg, [1, 2, 3], [1, 2, 10]) == [True, True, True]
    assert _changed_rows(encoder, eeg, [10, 10, 10], [1, 2, 10]) == [False, False, False]


@torch.no_grad()
@pytest.mark.parametrize("other", [2, -1])
def test_each_row_uses_its_own_subject(other):
    encoder, eeg = _encoder().eval(), _eeg(4)
    for row in range(4):
        ids = [0, 1, 0, 1]
        changed = [*ids[:row], other, *ids[row + 1 :]]
        expected = [index == row for index in range(4)]
        assert _changed_rows(encoder, eeg, ids, changed) == expected


@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch():
    encoder, eeg, ids = _encoder().eval(), _eeg(5), torch.tensor([2, -1, 0, 2, 1])
    _train_subject_layer(encoder)
    whole = encoder(eeg, ids)
    for row in range(5):
        alone = encoder(eeg[row : row + 1], ids[row : row + 1])
        torch.testing.assert_close(whole[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder(eeg.flip(0), ids.flip(0)), whole.flip(0))


@torch.no_grad()
def test_unknown_subject_uses_the_shared_token_and_the_mean_layer():
    encoder, eeg, unknown = _encoder().eval(), _eeg(2), torch.tensor([-1, -1])
    _train_subject_layer(encoder)
    layer, tokens = encoder.subject_layer, encoder.encoder.enc_embedding.subject_embedding
    before = encoder(eeg, unknown)
    mean = eeg + eeg @ layer.weight.mean(0) + layer.bias.mean(0)
    torch.testing.assert_close(layer(eeg, unknown), mean)
    tokens.subject_embedding.weight.add_(1.0)
    torch.testing.assert_close(encoder(eeg, unknown), before)
    tokens.shared_embedding.mul_(-1.0)
    assert (encoder(eeg, unknown) - before).norm() > 0.01 * before.norm()


@torch.no_grad()
def test_subject_layer_changes_the_rows_of_its_subject_only():
    encoder, eeg, ids = _encoder().eval(), _eeg(4), torch.tensor([0, 1, 2, 1])
    before = encoder(eeg, ids)
    torch.nn.init.normal_(encoder.subject_layer.weight[1], std=0.3)
    moved = (encoder(eeg, ids) - before).norm(dim=1)
    assert (moved[[1, 3]] > 0.1).all()
    assert (moved[[0, 2]] < 1e-5).all()


@torch.no_grad()
def test_subject_linear_is_the_formula_and_starts_as_the_identity():
    layer, eeg = SubjectLinear(SUBJECTS, T), _eeg(2)
    torch.testing.assert_close(layer(eeg, torch.tensor([0, 2])), eeg, rtol=0, atol=0)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    expected = torch.stack(
        [eeg[i] + eeg[i] @ layer.weight[s] + layer.bias[s] for i, s in ((0, 2), (1, 0))]
    )
    torch.testing.assert_close(layer(eeg, torch.tensor([2, 0])), expected)


def test_gradients_of_the_subject_layer_stay_with_the_subjects_present():
    encoder = _encoder()
    encoder(_eeg(4), torch.tensor([0, 2, 0, 2])).square().sum().backward()
    for parameter in (encoder.subject_layer.weight, encoder.subject_layer.bias):
        per_subject = parameter.grad.flatten(1).abs().sum(1)
        assert (per_subject > 0).tolist() == [True, False, True]


def test_every_parameter_is_trained():
    """127,250 of the published encoder's parameters never got a gradient."""
    encoder = _encoder().eval()  # no dropout; batch norm would hide the biases before it
    _train_subject_layer(encoder)
    ids = torch.tensor([0, 1, 2, -1])
    targets = {name: torch.randn(4, D) for name in NAMES}
    scale = encoder.similarity_scale
    loss = contrastive_total(encoder(_eeg(4), ids), targets, scale, Contrast(0.01), None)
    loss.backward()
    dead = [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []
    table = encoder.encoder.enc_embedding.subject_embedding.subject_embedding
    assert table.weight.grad.abs().sum(1).min() > 0


def test_similarity_scale_is_the_exponential_of_its_parameter_up_to_100():
    encoder = _encoder()
    assert encoder.similarity_scale.item() == pytest.approx(1 / 0.07, rel=1e-5)
    encoder.logit_scale.data.fill_(10.0)
    assert encoder.similarity_scale.item() == pytest.approx(100.0, rel=1e-5)
    published = _encoder(reference=True)
    assert published.similarity_scale.item() == pytest.approx(math.log(1 / 0.07), rel=1e-5)


def test_dropout_works_in_training_only():
    encoder, eeg, ids = _encoder(), _eeg(3), torch.tensor([0, 1, 2])
    assert not torch.equal(encoder(eeg, ids), encoder(eeg, ids))
    encoder.eval()
    assert torch.equal(encoder(eeg, ids), encoder(eeg, ids))


# --- shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(C, T), (2, 1, C, T), (2, C + 1, T), (2, C, T - 1), (2, T, C)])
def test_wrong_eeg_shape_is_refused(shape):
    with pytest.raises(ValueError, match=rf"expected \[B, {C}, {T}\]"):
        _encoder()(torch.zeros(shape), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1)])
def test_wrong_subject_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"subject has shape .* expected \[2\]"):
        _encoder()(_eeg(2), torch.zeros(shape, dtype=torch.int64))


@torch.no_grad()
@pytest.mark.parametrize(
    "sizes",
    [
        {"n_channels": 32, "n_times": 100, "embed_dim": 64},
        {"n_channels": 17, "n_times": 250, "embed_dim": 512, "n_subjects": 1},
        {"n_channels": 5, "n_times": 60, "embed_dim": 32, "width": 120, "heads": 3},
    ],
)
@pytest.mark.parametrize("reference", [False, True])
def test_other_sizes_run(sizes, reference):
    encoder = _encoder(**sizes, reference=reference).eval()
    eeg = torch.randn(2, sizes["n_channels"], sizes["n_times"])
    output = encoder(eeg, torch.tensor([0, 0]))
    assert output.shape == (2, sizes["embed_dim"]) and output.isfinite().all()
    assert (output[0] - output[1]).norm() > 0.01


# --- the decoder ------------------------------------------------------------------------------


def _write_decoder(run, bank: PriorBank | None) -> Decoder:
    decoder = Decoder(_encoder(n_subjects=2), bank, SIGNAL, {"model": "M", "weights": "w"}).eval()
    _train_subject_layer(decoder.encoder)
    path = run / "checkpoints" / "best" / "model.safetensors"
    save_tensors(path, decoder.state_dict(), decoder.header())
    return decoder


def _bank() -> PriorBank:
    torch.manual_seed(5)
    bank = PriorBank(D, D)
    bank.fit_targets({name: 3 + 2 * torch.randn(20, D) for name in NAMES})
    return bank


@torch.no_grad()
def test_decoder_comes_back_bit_for_bit(tmp_path):
    decoder = _write_decoder(tmp_path, _bank())
    torch.manual_seed(99)
    loaded = Decoder.load(tmp_path, "best")
    eeg, ids = _eeg(3), torch.tensor([1, 0, -1])
    embedding = decoder.embed(eeg, ids)
    assert torch.equal(loaded.embed(eeg, ids), embedding)
    before, after = (d.bank.eval().sample(embedding, 2, 1.0, [1, 2, 3]) for d in (decoder, loaded))
    assert all(torch.equal(before[name], after[name]) for name in NAMES)
    assert (loaded.signal, loaded.clip) == (decoder.signal, decoder.clip)
    assert not loaded.training


@torch.no_grad()
def test_decoder_without_priors_comes_back(tmp_path):
    decoder = _write_decoder(tmp_path, None)
    loaded = Decoder.load(tmp_path, "best")
    assert loaded.bank is None
    eeg, ids = _eeg(2), torch.tensor([0, 1])
    assert torch.equal(loaded.embed(eeg, ids), decoder.embed(eeg, ids))


def test_embedding_does_not_depend_on_the_batch_size():
    decoder = Decoder(_encoder(n_subjects=2), None, SIGNAL, {}).eval()
    eeg, ids = _eeg(5), torch.tensor([0, 1, -1, 1, 0])
    torch.testing.assert_close(decoder.embed(eeg, ids, 2), decoder.embed(eeg, ids, 5))


def test_subject_index_is_the_row_or_unknown():
    decoder = Decoder(_encoder(n_subjects=2), None, SIGNAL, {})
    assert decoder.subject_index("sub-01") == 0
    assert decoder.subject_index("sub-08") == 1
    assert decoder.subject_index("sub-10") == -1


def test_checkpoints_that_are_none_are_refused(tmp_path):
    with pytest.raises(util.DataError, match="no such file"):
        Decoder.load(tmp_path, "best")
    decoder = _write_decoder(tmp_path, None)
    path = tmp_path / "checkpoints" / "best" / "model.safetensors"
    save_tensors(path, decoder.state_dict(), {})
    with pytest.raises(util.DataError, match="without this project's header"):
        Decoder.load(tmp_path, "best")
    state = decoder.state_dict()
    state.pop("encoder.logit_scale")
    save_tensors(path, state, decoder.header())
    with pytest.raises(util.DataError, match="logit_scale"):
        Decoder.load(tmp_path, "best")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(util.DataError, match="unreadable"):
        Decoder.load(tmp_path, "best")
