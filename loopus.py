"""LoopUS: a pretrained language model whose middle layers are run again and again.

The method is that of arXiv 2605.11011. The first layers of a pretrained model (a Llama, Qwen3 or
Phi-3) encode the text once (E). Its middle layers become one block (M) that is run up to B times on
the same state. Its last layers decode the state (D). Two small parts are new: a gate that decides,
for each token and channel, how much of the block's proposal enters the state, and a head that says
when to stop.

                     ┌──────────── B times ────────────┐
                     ▼                                 │
    ids ─► E ─ h⁰ ─► hᵇ ─► M ─► M(hᵇ) ─► gate ─► hᵇ⁺¹ ─┴─► D ─► logits
                     │            │        ▲
                     └─── − ──────┴─► δ ───┴─► head ─► q: stop?

The model, with the paper's equation numbers (⊙ is a product channel by channel, b counts from 0):

    h⁰     = E(ids)                            eq. 1   once; never trained
    hᵇ⁺¹   = G(M, hᵇ)                          eq. 2   one loop, which is:
    δ      = M(hᵇ) − hᵇ                                what the block would change
    Δ      = softplus(W δ + c)                 eq. 3   W has rank ⌈hidden_size / 16⌉
    α      = exp(−Δ ⊙ exp(A_log))              eq. 4   the gate: 1 is open, 0 is shut
    hᵇ⁺¹   = α ⊙ M(hᵇ) + (1 − α) ⊙ hᵇ          eq. 5   α multiplies the new proposal
    q      = σ(head(δ of the last token))      eq. 9   confidence; stop once q ≥ q_th
    logits = D(hᵇ)                                     after any number of loops

The losses of a supervised loop hᵇ → hᵇ⁺¹, for each sequence of a batch (train.py):

    L_LM   = mean of −log p(next token), p = softmax(D(hᵇ⁺¹))              eq. 11
    L_mono = SiLU(L_LM − the same of D(hᵇ), which counts as a constant)    eq. 12
    L_Q    = BCE(q, share of next tokens that argmax D(hᵇ⁺¹) gets right)   eq. 13
    L      = L_LM + L_mono + L_Q                                           eq. 10

L_LM makes every depth a place where one may stop and decode. L_mono asks that a loop should not
make things worse: SiLU(x) = x σ(x) nears x where the loss has risen, so that a rise costs its full
size, is x / 2 around 0, and flattens out where the loss has fallen (its lowest value is −0.28), so
that a loop which helps much is not pushed to help ever more. L_Q teaches the head how good the
state is. Its target belongs to the whole sequence, because training decodes all tokens at one
depth, and how many of them are right is then known at no cost. Its input is one token, because
generation has no more when it must decide: the newest token's δ. So q estimates how well this depth
serves this text, not whether this one token is right. δ is not detached for the head: L_Q trains M
too.

In the paper no gradient crosses from one loop into the loop before it: the state is detached, so
that training needs the memory of one loop whatever B is. The price is that a loop learns only what
lowers the loss at once. With `train.py --horizon` gradients cross several loops.

Letters in shapes (as functions, E, M, D and G are the model's parts): N rows of a batch, T tokens,
D channels (hidden_size), V vocabulary, H query heads, G key/value heads, K channels of a head
(head_dim), S columns of a cache that may be seen. B loops; in generation B is called the budget.
Names: what is pretrained carries Hugging Face's names, what LoopUS adds carries those of the
published LoopUS checkpoints: `state_dict()` is what their model.safetensors contains.

The first half of this file is the model, leaf to root. The second half is generation: first at its
plainest, without a cache, then with one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from appendix.errors import InputError, require, require_memory

ADDED = ("reasoning.gate.", "q_head.")  # the names of what LoopUS adds to a backbone begin so


@dataclass
class LoopUSConfig:
    """Shape of the backbone (Hugging Face's field names), and how its layers go to E, M and D.

    Raises InputError if the fields contradict each other.
    """

    model_type: str = "llama"  # or "phi3", or "qwen3", which normalises each head's q and k
    vocab_size: int = 32000  # V
    hidden_size: int = 2048  # D
    intermediate_size: int = 5632
    num_hidden_layers: int = 22
    num_attention_heads: int = 32  # H
    num_key_value_heads: int | None = None  # G; None: H
    head_dim: int | None = None  # K; None: D / H. In Qwen3 it is not D / H
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0  # share of a head's channels that are rotated
    rope_scaling: dict | None = None  # Llama 3's, the arguments of `stretch`
    max_position_embeddings: int = 2048
    encoder_layers: int = 1  # layers of E, from the front
    decoder_layers: int = 1  # layers of D, from the back; M has the rest
    loops: int = 20  # B
    exit_threshold: float = 0.6  # q_th
    base_model: str = ""  # where the backbone came from, for the record
    from_checkpoint: bool = False  # loaded from a LoopUS checkpoint: gate and head are trained

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        H, G = self.num_attention_heads, self.num_key_value_heads
        require(
            self.model_type in ("llama", "qwen3", "phi3"),
            f"model_type {self.model_type!r} is not supported; llama, qwen3 and phi3 are",
        )
        require(H % G == 0, f"num_attention_heads {H} is no multiple of num_key_value_heads {G}")
        require(
            self.rotary_dim % 2 == 0 and 2 <= self.rotary_dim <= self.head_dim,
            f"{self.rotary_dim} of head_dim {self.head_dim} channels are rotated; rotary positions "
            "need pairs of channels",
        )
        encoder, decoder = self.encoder_layers, self.decoder_layers
        require(
            min(encoder, decoder, self.reasoning_layers) >= 1,
            f"split {encoder},{decoder} of {self.num_hidden_layers} layers: encoder, reasoning "
            "block and decoder each need one",
        )

    @property
    def rotary_dim(self):
        """Channels of a head that are rotated, the first ones."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def reasoning_layers(self):
        """Layers of M."""
        return self.num_hidden_layers - self.encoder_layers - self.decoder_layers


# ---- the backbone: one layer of Llama, Qwen3 or Phi-3 --------------------------------------------


@dataclass
class Span:
    """Neighbouring tokens of every row that go through the layers together.

    A text that is computed whole is one span. With a cache, a prompt is a span and then every new
    token is one; `columns`, `visible` and `live` are for the cache only.
    """

    cos: torch.Tensor  # (N or 1, 1, T, rotary_dim) of the angles of their positions
    sin: torch.Tensor  # (N or 1, 1, T, rotary_dim)
    mask: torch.Tensor | None = None  # (N or 1, 1, T, S) True: may attend. None: all that is causal
    columns: torch.Tensor | None = None  # (T,) where their keys and values are written
    visible: slice | None = None  # the S columns they may attend to
    live: torch.Tensor | None = None  # (N,) rows that still loop, the only ones written. None: all


def rotary_angles(positions, config, dtype):
    """Cosines and sines for `rotate`, of tokens at positions (..., T): two of (..., T, R).

    R (rotary_dim, mostly K) channels are rotated. Channels i and i + R/2 are a pair and share an
    angle; the first of them has a negative sine.
    """
    R = config.rotary_dim
    powers = torch.arange(0, R, 2, device=positions.device).float() / R
    periods = config.rope_theta**powers  # (R/2,) positions for an angle of 1
    if config.rope_scaling:
        periods = stretch(periods, **config.rope_scaling)
    angles = positions[..., None].float() / periods  # (..., T, R/2)
    cos = angles.cos().to(dtype)
    sin = angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def stretch(periods, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    """Llama 3's rotary scaling, for longer contexts: rotations that turn often within the original
    context stay as they are, slow ones become `factor` times slower, between them it is a mix."""
    turns = original_max_position_embeddings / (2 * math.pi * periods)
    stays = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return periods / (stays + (1 - stays) / factor)


def rotate(x, cos, sin):
    """Turn each pair (a, b) of channels of x (N, H, T, K) into (a cos − b sin, b cos + a sin).

    The pairs are Hugging Face's, (i, i + R/2), not neighbours as in other code. Where fewer than K
    channels are rotated (Phi-3's family), the others stay.
    """
    R = cos.shape[-1]
    if x.shape[-1] > R:
        return torch.cat((rotate(x[..., :R], cos, sin), x[..., R:]), dim=-1)
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # (b, a)
    return torch.addcmul(x * cos, swapped, sin)  # x · cos + swapped · sin


def attend(q, k, v, mask):
    """Each of q (N, H, T, K) attends to its group's k and v (N, G, S, K) -> (N, H, T, K).

    mask (N or 1, 1, T, S), True: may attend. None: a single token sees all S; of T = S tokens each
    sees what is causal.
    """
    N, H, T, K = q.shape
    G = k.shape[1]
    if T == 1:  # a group's queries in place of tokens: any kernel takes that, and k is read once
        y = F.scaled_dot_product_attention(q.view(N, G, H // G, K), k, v, mask)
        return y.view(N, H, T, K)
    if q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # No fused kernel takes groups here, and the plain one would make all T x S scores.
        k = k.repeat_interleave(H // G, dim=1)  # (N, H, S, K)
        v = v.repeat_interleave(H // G, dim=1)
    causal = mask is None
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; Qwen3 also normalises queries and keys."""

    def __init__(self, config):
        super().__init__()
        D, K = config.hidden_size, config.head_dim
        self.head_dim = K
        self.q_proj = nn.Linear(D, config.num_attention_heads * K, bias=False)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * K, bias=False)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * K, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * K, D, bias=False)
        self.normed = config.model_type == "qwen3"
        if self.normed:
            self.q_norm = nn.RMSNorm(K, config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(K, config.rms_norm_eps)

    def forward(self, x, span, cache=None):
        """x (N, T, D) -> (N, T, D). cache: this layer's LayerCache, or None."""
        N, T, _ = x.shape
        q = self.q_proj(x).view(N, T, -1, self.head_dim).transpose(1, 2)  # (N, H, T, K)
        k = self.k_proj(x).view(N, T, -1, self.head_dim).transpose(1, 2)  # (N, G, T, K)
        v = self.v_proj(x).view(N, T, -1, self.head_dim).transpose(1, 2)  # (N, G, T, K)
        if self.normed:
            q = self.q_norm(q)
            k = self.k_norm(k)
        q = rotate(q, span.cos, span.sin)
        k = rotate(k, span.cos, span.sin)
        if cache is not None:
            k, v = cache.update(k, v, span)  # (N, G, S, K): the earlier tokens' too
        y = attend(q, k, v, span.mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A pre-norm transformer layer: (N, T, D) -> (N, T, D)."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, span, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), span, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Layers(nn.ModuleList):
    """A stack of layers: (N, T, D) -> (N, T, D). cache: a list of their LayerCaches, or None."""

    def __init__(self, config, depth):
        super().__init__(Layer(config) for _ in range(depth))

    def forward(self, x, span, cache=None):
        for i, layer in enumerate(self):
            x = layer(x, span, None if cache is None else cache[i])
        return x


# ---- what LoopUS adds ----------------------------------------------------------------------------


class Gate(nn.Module):
    """The selective gate: how far each channel of each token opens to the proposal M(h).

    It is Mamba's selective step size: a softplus makes a positive step Δ of δ, and every channel
    has a rate of its own, exp(A_log), at which α falls as the step grows. In Mamba exp(−Δ · rate)
    multiplies the old state; here it multiplies the proposal, so a large Δ shuts the gate.
    """

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        rank = math.ceil(D / 16)
        # W is the product of these two. Their names are the published ones: δ is not in them.
        self.dt_input_proj = nn.Linear(D, rank, bias=False)
        self.delta_proj = nn.Linear(rank, D)
        self.A_log = nn.Parameter(torch.empty(D))
        if not self.A_log.is_meta:  # load_weights builds models without memory and fills them after
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, init="paper"):
        """Fill a fresh gate, in one of two ways.

        `paper`: as the authors' code does. Steps from 0.001 to 0.1 and rates 1 … D, both as in
        Mamba, so that the channels cover many time scales. The wider the model, the more it is
        shut: mean α at δ = 0 is 0.25 for D = 576 and 0.05 for D = 4096.
        `open`: α = 0.9 in every channel whatever δ is. The first loop is then nearly the pretrained
        model: its loss is the pretrained one within 2 % (docs/smollm2.md).
        """
        require(init in ("paper", "open"), f"gate init {init!r}: expected paper or open")
        D, rank = self.delta_proj.weight.shape
        self.dt_input_proj.reset_parameters()
        if init == "paper":
            nn.init.uniform_(self.delta_proj.weight, -(rank**-0.5), rank**-0.5)
            log_size = torch.empty(D).uniform_(math.log(1e-3), math.log(1e-1))
            step_size = log_size.exp().clamp(min=1e-4)
            self.A_log.copy_(torch.arange(1, D + 1).log())
        else:
            self.delta_proj.weight.zero_()
            self.A_log.zero_()
            step_size = torch.full((D,), -math.log(0.9))
        inverse_softplus = step_size + torch.log(-torch.expm1(-step_size))
        self.delta_proj.bias.copy_(inverse_softplus)  # so that softplus(bias) = step_size

    def forward(self, delta):
        """δ (N, T, D) -> α (N, T, D)."""
        step_size = F.softplus(self.delta_proj(self.dt_input_proj(delta)))  # Δ, eq. 3
        return torch.exp(-step_size * self.A_log.exp())  # α, eq. 4

    def open_fully(self):
        """α = 1 whatever δ is: a loop is then the pretrained block itself."""
        self.A_log.data.fill_(-torch.inf)  # rates of 0


class Encoder(nn.Module):
    """E: the embedding and the first layers."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = Layers(config, config.encoder_layers)

    def forward(self, ids, span, cache=None):
        """ids (N, T) -> h⁰ (N, T, D). Eq. 1."""
        return self.layers(self.embed_tokens(ids), span, cache)


class Reasoning(nn.Module):
    """M with its gate: the block that is looped."""

    def __init__(self, config):
        super().__init__()
        self.layers = Layers(config, config.reasoning_layers)
        self.gate = Gate(config)

    def forward(self, h, span, cache=None):
        """One loop: hᵇ (N, T, D) -> hᵇ⁺¹ (N, T, D) and δ (N, T, D).

        The layers compute in the backbone's precision, often bf16. The gate's parameters stay fp32
        (loading, load_weights.py, and training, appendix/optim.py, see to it), and δ, α and the
        mixture are computed in fp32: δ is a difference of two large numbers, and an α near 0 or 1
        needs more digits than bf16 has.
        """
        precision = self.gate.A_log.dtype
        proposal = self.layers(h, span, cache).to(precision)  # M(hᵇ)
        old = h.to(precision)
        delta = proposal - old  # δ
        alpha = self.gate(delta)  # eq. 3, 4
        mixed = alpha * proposal + (1 - alpha) * old  # eq. 5
        return mixed.to(h.dtype), delta


class Decoder(nn.Module):
    """D: the last layers, the final norm and the output head."""

    def __init__(self, config):
        super().__init__()
        self.layers = Layers(config, config.decoder_layers)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        # A backbone whose head is tied to its embedding gives a copy, which is trained alone.
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def logits(self, x):
        """What the layers made (..., D) -> (..., V)."""
        return self.lm_head(self.norm(x))

    def forward(self, h, span, cache=None):
        """h (N, T, D) -> logits (N, T, V)."""
        return self.logits(self.layers(h, span, cache))

    def last(self, h, span, cache=None):
        """h (N, T, D) -> logits (N, V) of the last token only."""
        return self.logits(self.layers(h, span, cache)[:, -1])


class LoopUS(nn.Module):
    """E, M with its gate, D and the confidence head. Its module tree is the published layout."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.reasoning = Reasoning(config)
        self.decoder = Decoder(config)
        self.q_head = nn.Sequential(
            nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, 1)
        )

    def span(self, T, window=None):
        """All T tokens of a text, without a cache; a token sees the last `window`, None: all."""
        weight = self.decoder.norm.weight
        positions = torch.arange(T, device=weight.device)
        cos, sin = rotary_angles(positions[None, None], self.config, weight.dtype)
        mask = None
        if window is not None and window < T:
            mask = sees(positions, positions, window)[None, None]
        return Span(cos, sin, mask)

    def q_logit(self, delta):
        """δ (N, T, D) -> the confidence's logit (N,), from the last token."""
        return self.q_head(delta[:, -1]).squeeze(-1)

    def encode(self, ids):
        """ids (N, T) -> h⁰ (N, T, D). Eq. 1."""
        return self.encoder(ids, self.span(ids.shape[1]))

    def loop(self, h):
        """hᵇ (N, T, D) -> hᵇ⁺¹ (N, T, D) and the confidence's logit (N,). Eq. 2-5, 9."""
        h, delta = self.reasoning(h, self.span(h.shape[1]))
        return h, self.q_logit(delta)

    def decode(self, h):
        """h (N, T, D) -> logits (N, T, V)."""
        return self.decoder(h, self.span(h.shape[1]))

    def forward(self, ids, loops=None):
        """ids (N, T) -> logits (N, T, V) after exactly `loops` loops (None: config.loops)."""
        loops = self.config.loops if loops is None else loops
        require(loops >= 1, f"loops {loops}: expected 1 or more")
        h = self.encode(ids)
        for _ in range(loops):
            h, _ = self.loop(h)
        return self.decode(h)

    def pretrained_loop(self, h):
        """M(h) as it was pretrained, without the gate: (N, T, D) -> (N, T, D)."""
        return self.reasoning.layers(h, self.span(h.shape[1]))

    def forward_pretrained(self, ids):
        """ids (N, T) -> logits (N, T, V) of the backbone as it was loaded: E, M without gate, D."""
        return self.decode(self.pretrained_loop(self.encode(ids)))

    def new_cache(self, rows, columns, depths):
        """An empty Cache. A method, so that compiled decoding can give another kind."""
        return Cache(self.config, rows, columns, depths, self.decoder.norm.weight)


def sees(reader, seen, window):
    """Who sees whom: (T, S), True where the token in column reader[i] may attend to column seen[j].

    It sees itself and what came before it, `window` tokens in all.
    """
    back = reader[:, None] - seen
    return (back >= 0) & (back < window)


# ---- generation at its plainest: without a cache -------------------------------------------------
#
# A pass is E, then loops, then the last token through D; it gives the next token. A row of a batch
# stops when it has looped enough in a pass, and it ends when its text does, at an end token.
# Here every pass computes the whole text anew, all of it to the depth of the new token. With a
# cache earlier tokens keep the depths they stopped at; the two agree where nothing stops early.


@dataclass
class Step:
    """One new token a row. A row that has ended repeats its last token, with 0 loops and q = 0."""

    tokens: torch.Tensor  # (N,)
    loops: torch.Tensor  # (N,) loops run by the pass that produced the token
    confidence: torch.Tensor  # (N,) q after the last of them


@dataclass
class Loop:
    """One loop of a pass, as a stopping rule sees it: it judges by the last token of each row."""

    confidences: list  # of (N,): q (eq. 9) after each loop so far
    new: torch.Tensor  # (N, T, D) hᵇ, and what it came from:
    old: torch.Tensor  # (N, T, D) hᵇ⁻¹
    decode: Callable[[], torch.Tensor]

    @cached_property
    def logits(self):
        """(N, V) of the next token. This runs D, so a rule pays for it only if it asks.

        D writes its cache, so the last call must be that of the newest loop. A rule that compares
        with the loop before therefore asks at every loop, the first too, and never later.
        """
        return self.decode()


@torch.inference_mode()
def continue_plainly(model, ids, max_new_tokens, stopping, draw, eos_ids, window):
    """Continue one row, ids (1, T); for every new token the whole text is computed again.

    stopping: when the loops of a pass end (below, with its rules). draw: logits (1, V) -> (1,).
    """
    for _ in range(max_new_tokens):
        span = model.span(ids.shape[1], window)
        h = model.encoder(ids, span)
        confidences = []
        before = None
        for _ in range(stopping.budget):
            new, delta = model.reasoning(h, span)
            confidences.append(model.q_logit(delta).sigmoid())
            loop = Loop([*confidences], new, h, partial(model.decoder.last, new, span))
            h = new
            if stopping.rule(loop, before, stopping.threshold).item():
                break
            before = loop
        check_finite(loop.logits)
        token = draw(loop.logits)  # (1,)
        yield Step(token, torch.full_like(token, len(confidences)), confidences[-1])
        if token.item() in eos_ids:
            return
        ids = torch.cat((ids, token[:, None]), dim=1)


def check_finite(logits):
    """Refuse logits that no token can be drawn from. This waits for the device."""
    if all(logits.isfinite().all(-1).tolist()):
        return
    raise InputError(
        f"the next token's logits are not finite, computed in {str(logits.dtype)[6:]}: the weights "
        "hold nan or inf, or numbers grew too large for this dtype; try --dtype float32, or "
        "another checkpoint"
    )


# ---- generation: drawing a token -----------------------------------------------------------------


@dataclass
class Sampler:
    """How the next token is drawn from its logits."""

    temperature: float
    top_k: int | None
    top_p: float | None
    generators: list  # of torch.Generator, one a row: it draws in a batch what it draws alone

    def draw(self, logits, rows):
        """logits (N, V) of these rows of the batch -> tokens (N,); temperature 0: the likeliest."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float()
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        if self.top_k is not None:
            smallest = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        if self.top_p is not None:  # keep the smallest set of tokens that holds top_p of p
            p, order = logits.softmax(-1).sort(descending=True, stable=True)
            drop = p.cumsum(-1) - p >= self.top_p
            logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
        p = logits.softmax(-1)
        drawn = [
            torch.multinomial(p[i], 1, generator=self.generators[r]) for i, r in enumerate(rows)
        ]
        return torch.cat(drawn)


# ---- generation: when a pass stops ---------------------------------------------------------------


# A rule says which rows have looped enough, (N,) bool, from this loop, the loop before (None at the
# first) and the threshold. A new rule is a function and an entry in RULES; if its threshold is no
# probability, sample.py's default for it is an entry in THRESHOLDS.


def never(loop, before, threshold):
    """Exactly the budget."""
    return torch.zeros_like(loop.confidences[-1], dtype=torch.bool)


def confident(loop, before, threshold):
    """The head is sure enough (eq. 9)."""
    return loop.confidences[-1] >= threshold


def confident_by_now(loop, before, threshold):
    """The chance that at least one loop so far was good enough, were they independent (App. E)."""
    doubt = (1 - torch.stack(loop.confidences)).prod(0)  # Π (1 − qʲ)
    return 1 - doubt >= threshold


def converged(loop, before, threshold):
    """The state hardly moves any more (App. E)."""
    moved = (loop.new[:, -1] - loop.old[:, -1]).float()  # hᵇ − hᵇ⁻¹ of the last token, (N, D)
    return moved.norm(dim=-1) <= threshold


def same_argmax(loop, before, threshold):
    """The most likely token is the same as a loop before."""
    new = loop.logits.argmax(-1)
    if before is None:
        return never(loop, before, threshold)
    return new == before.logits.argmax(-1)


def same_distribution(loop, before, threshold):
    """The next token's distribution hardly changes: KL(pᵇ ‖ pᵇ⁻¹), in nats."""
    new = loop.logits.float().log_softmax(-1)
    if before is None:
        return never(loop, before, threshold)
    old = before.logits.float().log_softmax(-1)
    return F.kl_div(old, new, reduction="none", log_target=True).sum(-1) <= threshold


RULES = {
    "confidence": confident,
    "cdf": confident_by_now,
    "convergence": converged,
    "argmax": same_argmax,
    "kl": same_distribution,
    "none": never,
}
PROBABILITIES = ("confidence", "cdf")  # their threshold is one; the checkpoint's q_th by default
THRESHOLDS = {"convergence": 10.0, "kl": 0.01}


@dataclass
class Stopping:
    """When a pass ends: after `budget` loops, or once the rule says so."""

    budget: int
    rule: Callable
    threshold: float


# ---- the cache -----------------------------------------------------------------------------------


class LayerCache:
    """Keys and values of one layer, (N, G, S, K) each: a column for each token.

    Prompts are padded on the left, so all rows end in the same column and the next token of every
    row goes into the next one. What a row's pads hold is never looked at by its tokens:

        column   0  1  2  3  4  5
        row 0    the cat sat on a _
        row 1    ·   ·   ·  it is _
    """

    def __init__(self, keys, values):
        self.keys = keys
        self.values = values

    def update(self, k, v, span):
        """Write a span's k and v (N, G, T, K); -> the keys and values (N, G, S, K) it may see.

        Rows that are not live keep what they have.
        """
        if span.live is not None:
            live = span.live[:, None, None, None]
            k = torch.where(live, k, self.keys.index_select(2, span.columns))
            v = torch.where(live, v, self.values.index_select(2, span.columns))
        self.keys.index_copy_(2, span.columns, k)
        self.values.index_copy_(2, span.columns, v)
        return self.keys[:, :, span.visible], self.values[:, :, span.visible]


class Cache:
    """Keys and values of all tokens so far: lists of LayerCaches for E, M and D (eq. 14-19).

    kv="latest" (depths = budget): M has a set for each loop. At loop b a token sees, of every
    earlier token, what that one made at loop b, or at its last loop if it stopped before that
    (`settle`).
    kv="shared" (depths = 1): M has one set. Every loop overwrites the token's own entry, so earlier
    tokens are always seen at their last loop, and the cache is smaller by a factor of B.
    `reference` in tests/test_generate.py says the same in plain lists, token by token.
    """

    def __init__(self, config, rows, columns, depths, like):
        require_memory(
            rows * columns * cache_bytes(config, depths, like.dtype),
            like.device,
            f"a cache of {rows} x {columns} tokens, {depths} loops deep",
            "lower max_new_tokens, the budget or the number of rows, or take kv shared",
        )
        self.depths = depths
        shape = (rows, config.num_key_value_heads, columns, config.head_dim)

        def layer_cache():
            return LayerCache(like.new_zeros(shape), like.new_zeros(shape))

        def all_depths():
            return like.new_zeros(depths, *shape)

        self.encoder = [layer_cache() for _ in range(config.encoder_layers)]
        self.decoder = [layer_cache() for _ in range(config.decoder_layers)]
        # M's layers keep all depths in one tensor each, (depths, N, G, S, K), for `settle`.
        self.block = [(all_depths(), all_depths()) for _ in range(config.reasoning_layers)]
        self.loops = [
            [LayerCache(keys[b], values[b]) for keys, values in self.block] for b in range(depths)
        ]

    def loop(self, b):
        """M's LayerCaches for loop b."""
        return self.loops[min(b, self.depths - 1)]

    def visible(self, start, T, window):
        """The columns that a span of T tokens from column `start` on may see."""
        return slice(max(0, start - window + 1), start + T)

    def settle(self, loops, columns):
        """Row r ran loops[r] loops for the tokens in `columns`: the keys and values of its last one
        are copied to all deeper sets. loops (N,), columns (T,).
        """
        if self.depths == 1:
            return
        # A row that has ended ran no loop, and keeps what it has.
        last = torch.where(loops > 0, loops - 1, self.depths - 1)  # (N,)
        depths = torch.arange(self.depths, device=loops.device)[:, None]
        source = torch.minimum(depths, last)  # (depths, N): the loop that each depth shows now
        rows = torch.arange(len(loops), device=loops.device)
        for keys, values in self.block:
            for x in (keys, values):
                made = x.index_select(3, columns)  # (depths, N, G, T, K)
                x.index_copy_(3, columns, made[source, rows])


def cache_bytes(config, depths, dtype):
    """Bytes of one token in a Cache."""
    layers = config.encoder_layers + config.decoder_layers + depths * config.reasoning_layers
    return layers * 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize


# ---- generation with a cache ---------------------------------------------------------------------


def cached_span(cache, angles, start, T, pads, window):
    """The T tokens in the columns from `start` on.

    angles: cosines and sines of all positions, (columns, R) each. pads (N,): how many of a row's
    first columns are padding; None: none anywhere.
    """
    columns = torch.arange(start, start + T, device=angles[0].device)
    visible = cache.visible(start, T, window)
    positions = columns[None]
    if pads is not None:
        positions = (columns - pads[:, None]).clamp(min=0)  # (N, T)
    cos, sin = (table[positions][:, None] for table in angles)  # (N or 1, 1, T, R) each

    # No mask is needed where the columns that may be seen end with these tokens and the window
    # hides none of them: for one token, or for a prompt, which Attention then makes causal.
    ends_here = visible.stop == start + T  # not so in appendix/fast.py's WholeCache
    in_window = T == 1 or (start == 0 and window >= T)
    mask = None
    if pads is not None or not (ends_here and in_window):
        seen = torch.arange(visible.start, visible.stop, device=columns.device)
        mask = sees(columns, seen, window)[None]  # (1, T, S)
        if pads is not None:
            no_pad = seen >= pads[:, None, None]
            itself = columns[:, None] == seen  # a pad sees itself: softmax of nothing would be nan
            mask = mask & (no_pad | itself)  # (N, T, S)
        mask = mask[:, None]
    return Span(cos, sin, mask, columns, visible)


# The kernels of attention for generation: all but cuDNN's, which makes a new plan for every length
# of the text.
GENERATING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def think(model, ids, span, cache, live, stopping):
    """One pass over ids (N, T): encode, loop until every row has stopped, decode the last token.

    A row that has stopped is frozen: it stays in the batch, which loops on for the others, but its
    state and its entries in the cache stay as they are. live (N,): rows whose text has not ended.
    -> logits (N, V), loops (N,), q (N,)
    """
    h = model.encoder(ids, span, cache.encoder)
    confidences = []
    loops = torch.zeros(len(ids), dtype=torch.long, device=h.device)
    before = None
    running = live.tolist()  # waits for the device, as check_finite and the test for the end do
    for b in range(stopping.budget):
        span.live = None if all(running) else live  # only live rows write to M's cache
        new, delta = model.reasoning(h, span, cache.loop(b))
        q = model.q_logit(delta).sigmoid()
        if span.live is not None:
            new = torch.where(live[:, None, None], new, h)
            q = torch.where(live, q, confidences[-1] if confidences else 0.0)
            span.live = None
        confidences.append(q)
        loops = loops + live
        decode = partial(model.decoder.last, new, span, cache.decoder)
        loop = Loop([*confidences], new, h, decode)
        h = new
        if stopping.rule is not never and b + 1 < stopping.budget:
            live = live & ~stopping.rule(loop, before, stopping.threshold)
            running = live.tolist()  # the one wait for the device in each loop
            if not any(running):
                break
        before = loop
    if not all(running):
        cache.settle(loops, span.columns)
    return loop.logits, loops, q


@torch.inference_mode()
def continue_with_cache(model, ids, pads, max_new_tokens, stopping, depths, draw, eos_ids, window):
    """Continue all rows of ids (N, T), padded on the left by pads (N,): a pass for the prompt, then
    one for every new token. draw: logits (N, V), rows of the batch -> (N,).
    """
    N, T = ids.shape
    cache = model.new_cache(N, T + max_new_tokens, depths)
    positions = torch.arange(T + max_new_tokens, device=ids.device)
    angles = rotary_angles(positions, model.config, model.decoder.norm.weight.dtype)
    ends = torch.tensor(eos_ids, device=ids.device)
    ended = torch.zeros(N, dtype=torch.bool, device=ids.device)
    start = 0
    for _ in range(max_new_tokens):
        span = cached_span(cache, angles, start, ids.shape[1], pads, window)
        with sdpa_kernel(GENERATING):
            logits, loops, q = think(model, ids, span, cache, ~ended, stopping)
        check_finite(logits)
        tokens = torch.where(ended, ids[:, -1], draw(logits, range(N)))
        yield Step(tokens, loops, q)
        if eos_ids:
            ended = ended | torch.isin(tokens, ends)
            if all(ended.tolist()):
                return
        start += ids.shape[1]
        ids = tokens[:, None]


def continue_rows_plainly(model, ids, lengths, max_new_tokens, stopping, draw, eos_ids, window):
    """continue_plainly for each row of ids (N, T) by itself, as steps of the whole batch."""
    rows = [
        continue_plainly(
            model,
            ids[r : r + 1, :n],
            max_new_tokens,
            stopping,
            partial(draw, rows=[r]),
            eos_ids,
            window,
        )
        for r, n in enumerate(lengths)
    ]
    latest = [None] * len(rows)
    for steps in zip_longest(*rows):
        for r, step in enumerate(steps):
            if step is None:  # the row has ended
                last = latest[r]
                step = Step(last.tokens, 0 * last.loops, 0 * last.confidence)
            latest[r] = step
        yield Step(
            torch.cat([step.tokens for step in latest]),
            torch.cat([step.loops for step in latest]),
            torch.cat([step.confidence for step in latest]),
        )


def pad_on_the_left(ids, lengths):
    """Rows (N, T) padded on the right -> padded on the left, and their pads (N,), None if none."""
    T = max(lengths)
    rows = [row[:T].roll(T - n) for row, n in zip(ids, lengths, strict=True)]
    if min(lengths) == T:
        return torch.stack(rows), None
    return torch.stack(rows), torch.tensor([T - n for n in lengths], device=ids.device)


def check_prompts(ids, lengths, vocab_size):
    """Refuse prompts that cannot be continued, in one line."""
    require(
        ids.dim() == 2 and ids.numel() > 0,
        f"ids of shape {tuple(ids.shape)}: expected (rows, tokens), neither empty",
    )
    N, T = ids.shape
    require(
        len(lengths) == N and all(1 <= n <= T for n in lengths),
        f"lengths {lengths}: expected {N} from 1 to {T}",
    )
    low, high = ids.min().item(), ids.max().item()
    require(
        low >= 0 and high < vocab_size,
        f"token ids from {low} to {high}: the vocabulary is 0 to {vocab_size - 1}",
    )


def check_option(name, value, low, high=math.inf):
    """Refuse a number out of its range, in one line."""
    bounds = f"at least {low}" if high == math.inf else f"{low} to {high}"
    require(value is not None and low <= value <= high, f"{name} {value}: expected {bounds}")


def check_choice(name, value, choices):
    """Refuse a word that is none of the choices, in one line."""
    require(value in choices, f"{name} {value!r}: expected one of {', '.join(choices)}")


def generate(
    model,
    ids,
    max_new_tokens,
    *,
    lengths=None,
    budget=8,
    exit_threshold=0.6,
    halt="confidence",
    kv="latest",
    temperature=1.0,
    top_k=None,
    top_p=None,
    eos_id=None,
    seed=None,
    use_cache=True,
    window=None,
):
    """Continue prompts: an iterator of `Step`, one a new token. Called as model.generate(ids, …).

    ids (N, T), padded on the right with any ids; lengths (N,): the valid tokens of each row (None:
    all).
    A token's pass runs up to `budget` loops and stops by `halt`, each row by itself; the tokens of
    a prompt stop together, by the last one:
      confidence   q >= exit_threshold (eq. 9)
      cdf          1 − Π (1 − qʲ) >= exit_threshold (App. E)
      convergence  ‖hᵇ − hᵇ⁻¹‖₂ <= exit_threshold (App. E)
      argmax       the most likely token did not change
      kl           KL(pᵇ ‖ pᵇ⁻¹) <= exit_threshold, in nats
      none         never: exactly `budget` loops
    kv: `latest` or `shared`, see Cache. temperature 0: the most likely token. Row r draws with
    seed + r. eos_id: the id, or several, that end a row (None: nothing does). window: a token
    sees the last `window` tokens, itself included (None: max_position_embeddings).
    use_cache=False computes every text anew, all its tokens to one depth (`kv` means nothing then):
    slow, and equal to kv="latest" where nothing stops early. Raises InputError: for bad arguments
    at once, for a cache that does not fit and for logits that are not finite in the iterator.
    """
    config = model.config
    if lengths is None:
        lengths = [ids.shape[-1]] * len(ids)
    lengths = torch.as_tensor(lengths).tolist()
    check_prompts(ids, lengths, config.vocab_size)
    check_choice("halt", halt, RULES)
    check_choice("kv", kv, ("latest", "shared"))
    check_option("budget", budget, 1)
    check_option("max_new_tokens", max_new_tokens, 0)
    check_option("exit_threshold", exit_threshold, 0, 1 if halt in PROBABILITIES else math.inf)
    check_option("temperature", temperature, 0)
    if top_k is not None:
        check_option("top_k", top_k, 1)
    if top_p is not None:
        check_option("top_p", top_p, 1e-9, 1)
    if window is None:
        window = config.max_position_embeddings
    check_option("window", window, 1)

    if seed is None:
        seed = torch.randint(2**62, ()).item()
    eos_ids = [] if eos_id is None else torch.as_tensor(eos_id).reshape(-1).tolist()
    stopping = Stopping(budget, RULES[halt], exit_threshold)
    generators = [torch.Generator(ids.device).manual_seed(seed + r) for r in range(len(ids))]
    draw = Sampler(temperature, top_k, top_p, generators).draw
    ids = ids.long()

    if not use_cache:
        return continue_rows_plainly(
            model, ids, lengths, max_new_tokens, stopping, draw, eos_ids, window
        )
    ids, pads = pad_on_the_left(ids, lengths)
    depths = budget if kv == "latest" else 1
    return continue_with_cache(
        model, ids, pads, max_new_tokens, stopping, depths, draw, eos_ids, window
    )


LoopUS.generate = generate  # a method, defined down here so that the model can be read without it
