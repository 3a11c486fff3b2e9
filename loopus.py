"""LoopUS, the whole model: a pretrained language model recast into a looped one (arXiv 2605.11011).

                     ┌──────────── B times ────────────┐
                     ▼                                 │
    ids ─► E ─ h⁰ ─► hᵇ ─► M ─► M(hᵇ) ─► gate ─► hᵇ⁺¹ ─┴─► D ─► logits
                     │            │        ▲     (stop once q ≥ q_th)
                     └─── − ──────┴─► δ ───┴─► head ─► q

The first layers of the pretrained model encode once (E), its middle layers become one block that is run again and again (M),
its last layers decode (D). A selective gate decides, per token and channel, how much of the block's proposal enters the state;
a confidence head says when to stop. h⁰ is not injected again, loops carry no index, rotary angles are the same at every loop.

    paper           here                              equation
    E               Encoder, LoopUS.encode            1
    M               Reasoning.layers                  2
    δ, Δ, α         Gate                              3, 4
    hᵇ⁺¹            LoopUS.loop                       2-5
    q               q_head, on δ of the last token    9
    D               Decoder, LoopUS.decode            -
    B               config.loops, budget              -
    q_th            config.exit_threshold             9
    KV cache        Cache, Span                      14-19 (App. A.4)
    loss            train.training_step               10-13

Shapes: N rows of a batch, T tokens, D channels (hidden_size), V vocabulary, H query heads, G key/value heads,
K channels of a head (head_dim), L layers of a stack, S slots of a cache, B loops.
Pretrained parts carry Hugging Face's names, added parts the published LoopUS checkpoints': `state_dict()` is the file.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from appendix.errors import InputError, free_memory, require

ADDED = ("reasoning.gate.", "q_head.")  # what LoopUS adds to a backbone; fp32 always


@dataclass
class LoopUSConfig:
    """Shape of the backbone (Hugging Face's field names) and of the recast. Raises InputError if they contradict."""

    model_type: str = "llama"  # or "qwen3", which normalises each head's queries and keys
    vocab_size: int = 32000
    hidden_size: int = 2048  # D
    intermediate_size: int = 5632
    num_hidden_layers: int = 22
    num_attention_heads: int = 32  # H
    num_key_value_heads: int | None = None  # G; None: H
    head_dim: int | None = None  # K; None: D / H. Qwen3's is not D / H
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    encoder_layers: int = 1  # layers of E; D has the last `decoder_layers`, M the rest
    decoder_layers: int = 1
    loops: int = 20  # B
    exit_threshold: float = 0.6  # q_th
    base_model: str = ""  # where the backbone came from, for the record
    from_checkpoint: bool = False  # loaded from a LoopUS checkpoint, so gate and head are not fresh

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.reasoning_layers = self.num_hidden_layers - self.encoder_layers - self.decoder_layers
        require(
            self.model_type in ("llama", "qwen3"),
            f"model_type {self.model_type!r} is not supported; llama and qwen3 are",
        )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads {self.num_attention_heads} is no multiple of num_key_value_heads {self.num_key_value_heads}",
        )
        require(
            self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd; rotary positions need pairs"
        )
        require(
            min(self.encoder_layers, self.decoder_layers, self.reasoning_layers) >= 1,
            f"split {self.encoder_layers},{self.decoder_layers} "
            f"of {self.num_hidden_layers} layers: encoder, reasoning block and decoder each need a layer",
        )


# ---- the backbone: one Llama or Qwen3 layer ------------------------------------------------------------------------
class Linear(nn.Linear):
    """A CPU's library may multiply a single token on one thread only (docs/speed.md); here the threads share 16 parts of the outputs."""

    def forward(self, x):
        alone = x.is_cpu and x.numel() == self.in_features
        if (
            alone and torch.compiler.is_compiling()
        ):  # the compiler writes such a sum as one loop over all threads
            return (x * self.weight).sum(-1).view(*x.shape[:-1], -1)
        if alone and x.dtype == torch.float32:
            parts = math.gcd(self.out_features, 16)  # (P, 1, in) times (P, in, out / P)
            return torch.bmm(
                x.expand(parts, 1, -1), self.weight.view(parts, -1, self.in_features).mT
            ).view(*x.shape[:-1], -1)
        return super().forward(x)


def rotary_angles(positions, config, dtype):
    """cos and sin of every position's angles: (..., T) -> two (..., T, K), to be broadcast over heads."""
    powers = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    angles = positions[..., None].float() / config.rope_theta**powers  # (..., T, K/2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat(
        (-sin, sin), dim=-1
    )  # pair i is channels i and i + K/2


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + K/2]) by its angle. Hugging Face's split halves, not interleaved pairs: (N, H, T, K)."""
    return torch.addcmul(
        x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin
    )  # a cos - b sin, b cos + a sin


@dataclass
class Span:
    """Tokens on their way through the layers together: where they stand and what they may attend to. With a cache, a span of one
    token a row is a decoding step and attends to the cache; a longer one is a prompt and attends to itself."""

    cos: torch.Tensor  # (N or 1, 1, T, K)
    sin: torch.Tensor
    mask: torch.Tensor | None = (
        None  # True: may attend; (1, 1, T, T) or (N, 1, 1, width). None: all that is causal
    )
    last: torch.Tensor | None = None  # (N,) index of each row's last valid token; None: T - 1
    rows: list | None = None  # the rows of the cache that its rows stand for, ascending; None: all
    slot: torch.Tensor | None = (
        None  # one token: (1,) the slot it is written to. A prompt: (N, width) the token each slot stores
    )
    width: int = 0  # slots of the cache that are read
    written: slice | None = None  # slots of the cache that are written

    def take(self, keep):  # the same span with its rows `keep` (a list) only
        pick = lambda x: (
            x if x is None or len(x) == 1 else x[keep]
        )  # of length 1 is what all rows share
        rows = keep if self.rows is None else [self.rows[i] for i in keep]
        return replace(
            self,
            cos=pick(self.cos),
            sin=pick(self.sin),
            mask=pick(self.mask),
            last=pick(self.last),
            slot=pick(self.slot),
            rows=rows,
        )

    def tail(self, x):
        return (
            x[:, -1] if self.last is None else x[torch.arange(len(x), device=x.device), self.last]
        )  # each row's last valid token: (N, D)

    def attend(self, q, k, v, cache=None):
        """Attention of q (N, H, T, K) over k, v (N, G, T, K), or over a layer's cache, two of (rows, G, S, K), which they enter first."""
        if cache is None or q.shape[2] > 1:
            if cache is not None:  # a prompt: every slot takes the last token that falls to it
                slot = self.slot[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
                for room, new in zip(cache, (k.gather(2, slot), v.gather(2, slot))):
                    room[slice(None) if self.rows is None else self.rows, :, : self.width] = new
            return F.scaled_dot_product_attention(
                q, k, v, self.mask, is_causal=self.mask is None and q.shape[2] > 1, enable_gqa=True
            )
        if self.rows is None:
            return self.attend_cached(q, k, v, *cache, self.mask)
        masks = (
            [None] * len(q) if self.mask is None else self.mask.split(1)
        )  # some rows only: one by one, since slices are views
        return torch.cat(
            [
                self.attend_cached(*one, *(x[row : row + 1] for x in cache), mask)
                for *one, mask, row in zip(q.split(1), k.split(1), v.split(1), masks, self.rows)
            ]
        )

    def attend_cached(self, q, k, v, keys, values, mask):
        keys.index_copy_(2, self.slot, k), values.index_copy_(2, self.slot, v)
        grouped = q.view(
            len(q), k.shape[1], -1, q.shape[3]
        )  # (N, G, H/G, K): a group's heads read its keys together
        return F.scaled_dot_product_attention(
            grouped, keys[:, :, : self.width], values[:, :, : self.width], mask
        ).view_as(q)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; Qwen3 also normalises each head's queries and keys."""

    def __init__(self, config):
        super().__init__()
        D, H, G, self.head_dim = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        K = self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (
            Linear(D, heads * K, bias=False) for heads in (H, G, G)
        )
        self.o_proj = Linear(H * K, D, bias=False)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(K, config.rms_norm_eps) if config.model_type == "qwen3" else None
            for _ in "qk"
        )

    def forward(self, x, span, kv=None):
        N, T, _ = x.shape
        q, k, v = (
            proj(x).view(N, T, -1, self.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)  # (N, H, T, K), (N, G, T, K)
        q, k = rotate(q, span.cos, span.sin), rotate(k, span.cos, span.sin)
        return self.o_proj(span.attend(q, k, v, kv).transpose(1, 2).flatten(2))  # (N, T, D)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        D, I = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj, self.down_proj = (
            Linear(D, I, bias=False),
            Linear(D, I, bias=False),
            Linear(I, D, bias=False),
        )

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, span, kv=None):
        x = x + self.self_attn(self.input_layernorm(x), span, kv)
        return x + self.mlp(self.post_attention_layernorm(x))


class Layers(nn.ModuleList):
    """A stack of layers; its cache is a list of theirs."""

    def forward(self, x, span, kv=None):
        for i, layer in enumerate(self):
            x = layer(x, span, None if kv is None else kv[i])
        return x


# ---- what LoopUS adds: the gate, and three names for the parts ------------------------------------------------------
class Gate(nn.Module):
    """Selective gate: how far each channel of each token opens to the proposal M(h), from δ = M(h) - h (eq. 3, 4): as in Mamba,
    Δ = softplus(W_Δ δ + b_Δ), W_Δ of rank r = ceil(D / 16), and α = exp(Δ ⊙ A), A = -exp(A_log). Loading and training keep it in fp32."""

    def __init__(self, config):
        super().__init__()
        D, r = config.hidden_size, math.ceil(config.hidden_size / 16)
        self.dt_input_proj = nn.Linear(D, r, bias=False)
        self.delta_proj = nn.Linear(r, D)
        self.A_log = nn.Parameter(torch.empty(D))
        if not self.A_log.is_meta:  # load_weights builds without memory and fills afterwards
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, init="paper"):
        """`paper`: the released initialisation; mean α at δ = 0 is 0.25 at D = 576, 0.05 at D = 4096: mostly shut.
        `open`: α = 0.9 in every channel, whatever δ: the loss after one loop is the pretrained one within 2 % (docs/smollm2.md)."""
        require(init in ("paper", "open"), f"gate init {init!r}: expected paper or open")
        D, r = self.delta_proj.weight.shape
        self.dt_input_proj.reset_parameters()
        if init == "paper":
            nn.init.uniform_(self.delta_proj.weight, -(r**-0.5), r**-0.5)
            dt = torch.empty(D).uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
            self.A_log.copy_(torch.arange(1, D + 1).log())
        else:
            self.delta_proj.weight.zero_(), self.A_log.zero_()
            dt = torch.full((D,), -math.log(0.9))
        self.delta_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # so that softplus(bias) = dt

    def forward(self, delta):
        """δ (N, T, D) -> α (N, T, D) in (0, 1)."""
        step = F.softplus(self.delta_proj(self.dt_input_proj(delta)))  # Δ, eq. 3
        return torch.exp(-step * self.A_log.exp())  # α, eq. 4


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = Layers(Layer(config) for _ in range(config.encoder_layers))

    def forward(self, ids, span, kv=None):
        return self.layers(self.embed_tokens(ids), span, kv)  # (N, T) -> (N, T, D)


class Reasoning(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = Layers(Layer(config) for _ in range(config.reasoning_layers))
        self.gate = Gate(config)


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = Layers(Layer(config) for _ in range(config.decoder_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(
            config.hidden_size, config.vocab_size, bias=False
        )  # untied: a copy of a tied embedding, trained alone

    def logits(self, h):
        return self.lm_head(self.norm(h))  # (..., D) -> (..., V)

    def last(self, h, span, kv=None):
        return self.logits(
            span.tail(self.layers(h, span, kv))
        )  # (N, T, D) -> (N, V), at each row's last valid token


# ---- generation: the caches, the stopping rules, the sampling -------------------------------------------------------
HALTS = ("confidence", "convergence", "cdf", "argmax", "kl", "none")


class Cache:
    """Keys and values of all tokens so far: one set for E, one per loop depth for M, one for D (eq. 14-19). At depth b a token
    attends, for every earlier token, to what that one made at depth b, or at its last depth if it stopped before (`fill`). With
    one depth (kv="shared") every loop overwrites the token's own entry. S slots are a ring: the newest takes the oldest's place."""

    def __init__(self, config, rows, size, depths, like):
        need, free = (
            rows * size * self.bytes_per_token(config, depths, like.dtype),
            free_memory(like.device),
        )
        require(
            need < free,
            f"a cache of {rows} x {size} tokens, {depths} loops deep, takes {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on "
            f"{like.device}: lower max_new_tokens, the budget, the window or the number of rows, or take kv shared",
        )
        shape = (rows, config.num_key_value_heads, size, config.head_dim)
        room = lambda layers, depths: [
            [like.new_zeros(depths, *shape) for _ in "kv"] for _ in range(layers)
        ]  # a layer's two of (B, N, G, S, K)
        at = lambda layers, depth: [[x[depth] for x in layer] for layer in layers]
        self.layers = room(config.reasoning_layers, depths)
        self.encoder, self.decoder = (
            at(room(config.encoder_layers, 1), 0),
            at(room(config.decoder_layers, 1), 0),
        )
        self.reasoning = [at(self.layers, depth) for depth in range(depths)]

    @staticmethod
    def bytes_per_token(config, depths, dtype):
        return (
            (config.num_hidden_layers + (depths - 1) * config.reasoning_layers)
            * 2
            * config.num_key_value_heads
            * config.head_dim
            * dtype.itemsize
        )

    def fill(self, loops, span):
        """The span's rows stopped after `loops` loops: its keys and values at the last of them stand for all deeper ones."""
        for row in span.rows:
            for stored in (
                x[:, row, :, span.written] for layer in self.layers for x in layer
            ):  # (B, G, slots, K)
                stored[loops:] = stored[loops - 1]


@dataclass
class Step:
    """One new token a row. A row that has ended gives eos_id, 0 loops and confidence 0."""

    tokens: torch.Tensor  # (N,)
    loops: torch.Tensor  # (N,) loops run by the pass that produced the token
    confidence: torch.Tensor  # (N,) q after the last of them


def sample(logits, noise, temperature, top_k, top_p):
    """Next tokens (N,) from logits (N, V). `noise`: one random generator a row, so that a row draws what it draws alone."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        logits = logits.masked_fill(
            logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf
        )
    if top_p is not None:  # the smallest set of tokens that holds top_p of the probability
        p, order = logits.softmax(-1).sort(descending=True, stable=True)
        drop = p.cumsum(-1) - p >= top_p
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    waits = torch.stack([torch.empty_like(logits[0]).exponential_(generator=g) for g in noise])
    return (logits.softmax(-1) / waits).argmax(
        -1
    )  # the first of V exponential clocks to ring, rates p: a draw from p


# ---- the model ------------------------------------------------------------------------------------------------------
class LoopUS(nn.Module):
    """E, M with its gate, D and the confidence head. Its module tree is the published checkpoints' layout."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder, self.reasoning, self.decoder = (
            Encoder(config),
            Reasoning(config),
            Decoder(config),
        )
        self.q_head = nn.Sequential(
            nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, 1)
        )
        self.compiled, self.static = None, False  # load_weights.compile_decoding

    def encode(self, ids):
        """h⁰ = E(x): (N, T) -> (N, T, D). Eq. 1."""
        return self.encoder(ids, self._span(ids.shape[-1]))

    def loop(self, h):
        """One gated pass of M: (N, T, D) -> hᵇ⁺¹ (N, T, D) and the confidence's logit (N,). Eq. 2-5, 9."""
        return self._loop(h, self._span(h.shape[1]))

    def decode(self, h):
        """D(h): (N, T, D) -> logits (N, T, V)."""
        return self.decoder.logits(self.decoder.layers(h, self._span(h.shape[1])))

    def forward(self, ids, loops=None):
        """Logits (N, T, V) after exactly `loops` loops (None: config.loops)."""
        loops = self.config.loops if loops is None else loops
        require(loops >= 1, f"loops {loops}: expected 1 or more")
        h = self.encode(ids)
        for _ in range(loops):
            h, _ = self.loop(h)
        return self.decode(h)

    def pretrained_loop(self, h):
        """M(h), without the gate: (N, T, D) -> (N, T, D)."""
        return self.reasoning.layers(h, self._span(h.shape[1]))

    def forward_pretrained(self, ids):
        """Logits (N, T, V) of the backbone as it was loaded: E, M once without the gate, D."""
        return self.decode(self.pretrained_loop(self.encode(ids)))

    def _span(self, T, window=None, **where):
        """T tokens from position 0 on. Beyond a window of W, token i attends to i - W + 1 … i only."""
        weight = self.decoder.norm.weight
        positions = torch.arange(T, device=weight.device)
        ago = positions[:, None] - positions
        mask = (
            ((ago >= 0) & (ago < window))[None, None] if window is not None and window < T else None
        )
        return Span(*rotary_angles(positions[None, None], self.config, weight.dtype), mask, **where)

    def _loop(self, h, span, kv=None):
        gate = self.reasoning.gate
        m, state = (x.to(gate.A_log.dtype) for x in (self.reasoning.layers(h, span, kv), h))
        delta = m - state  # δ = M(h) - h, eq. 3
        alpha = gate(delta)  # eq. 3, 4
        mixed = alpha * m + (1 - alpha) * state  # eq. 5
        return mixed.to(h.dtype), self.q_head(span.tail(delta)).squeeze(-1)

    def generate(
        self,
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
        """Continue prompts; an iterator of `Step`, one a new token.

        ids (N, T), padded on the right; lengths (N,) the valid tokens of each row (None: all). A token's pass runs up to `budget`
        loops and stops by `halt`, each row by itself; a prompt's tokens stop together, by the last one:
          confidence   q >= exit_threshold (eq. 9)                  argmax  the most likely token did not change
          cdf          1 - Π (1 - qʲ) >= exit_threshold (App. E)    kl      KL(pᵇ ‖ pᵇ⁻¹) <= exit_threshold, in nats
          convergence  ‖hᵇ - hᵇ⁻¹‖₂ <= exit_threshold (App. E)      none    never: exactly `budget` loops
        kv: `latest` keeps keys and values per loop depth, `shared` one set (see Cache). temperature 0: argmax. Row r draws
        with seed + r. eos_id ends a row; None: never. window: a token attends to the last `window` tokens, itself included
        (None: max_position_embeddings). use_cache=False computes every prefix anew, its tokens together. Raises InputError.
        """
        require(
            ids.dim() == 2 and ids.numel() > 0,
            f"ids of shape {tuple(ids.shape)}: expected (rows, tokens), neither empty",
        )
        lengths = (
            [ids.shape[1]] * len(ids) if lengths is None else torch.as_tensor(lengths).tolist()
        )
        require(
            len(lengths) == len(ids) and all(1 <= n <= ids.shape[1] for n in lengths),
            f"lengths {lengths}: expected {len(ids)} from 1 to {ids.shape[1]}",
        )
        require(
            0 <= ids.min() and ids.max() < self.config.vocab_size,
            f"token ids from {ids.min()} to {ids.max()}: the vocabulary is 0 to {self.config.vocab_size - 1}",
        )
        require(halt in HALTS, f"halt {halt!r}: expected one of {', '.join(HALTS)}")
        require(kv in ("latest", "shared"), f"kv {kv!r}: expected latest or shared")
        window, most = (
            self.config.max_position_embeddings if window is None else window,
            1 if halt in ("confidence", "cdf") else math.inf,
        )
        for name, value, low, high in (
            ("budget", budget, 1, math.inf),
            ("max_new_tokens", max_new_tokens, 0, math.inf),
            ("window", window, 1, math.inf),
            ("exit_threshold", exit_threshold, 0, most),
            ("temperature", temperature, 0, math.inf),
            ("top_k", top_k, 1, math.inf),
            ("top_p", top_p, 1e-9, 1),
        ):
            require(
                value is None or low <= value <= high, f"{name} {value}: expected {low} to {high}"
            )
        seed = torch.randint(2**62, ()).item() if seed is None else seed
        noise = [torch.Generator(ids.device).manual_seed(seed + r) for r in range(len(ids))]
        draw = lambda logits, rows: sample(
            logits, [noise[r] for r in rows], temperature, top_k, top_p
        )
        return self._generate(
            ids.long(),
            lengths,
            max_new_tokens,
            dict(budget=budget, halt=halt, threshold=exit_threshold),
            kv,
            draw,
            eos_id,
            use_cache,
            window,
        )

    @torch.inference_mode()
    def _generate(
        self, ids, lengths, max_new_tokens, stopping, kv, draw, eos_id, use_cache, window
    ):
        (N, T), device, weight = ids.shape, ids.device, self.decoder.norm.weight
        size, rows, ragged = min(window, T + max_new_tokens), [*range(N)], min(lengths) < T  # S
        cache = (
            Cache(self.config, N, size, stopping["budget"] if kv == "latest" else 1, weight)
            if use_cache
            else None
        )
        lengths = torch.tensor(lengths, device=device)
        pads, slots = T - lengths, torch.arange(size, device=device)
        for end in range(
            T - 1, T - 1 + max_new_tokens
        ):  # every row ends at column `end` of the cache, and begins behind its pad
            width = size if self.static and end >= T else min(size, end + 1)
            held = (
                end - (end - slots[:width]) % size
            )  # the column whose keys and values a slot holds: the last that is s modulo S
            chosen = None if len(rows) == N else rows
            if use_cache and (end >= T or T == 1):  # one token a row
                mask = held >= pads[:, None, None, None] if ragged or self.static else None
                angles = rotary_angles((end - pads)[:, None, None], self.config, weight.dtype)
                span = Span(
                    *angles,
                    mask,
                    None,
                    chosen,
                    slots[end % size :][:1],
                    width,
                    slice(end % size, end % size + 1),
                )
            else:  # all so far
                stored = (held - pads[:, None]).clamp(min=0)
                span = self._span(
                    ids.shape[1],
                    window,
                    last=lengths - 1,
                    rows=chosen,
                    slot=stored,
                    width=width,
                    written=slice(width),
                )
            logits, loops, confidence = self._think(ids, span, cache, **stopping)
            tokens = draw(logits, rows)
            step = (
                (tokens, eos_id or 0),
                (torch.tensor(loops, device=device), 0),
                (confidence, 0.0),
            )
            yield Step(
                *(
                    x
                    if chosen is None
                    else x.new_full((N,), ended).index_copy(0, torch.tensor(rows, device=device), x)
                    for x, ended in step
                )
            )
            keep = (
                [i for i, token in enumerate(tokens.tolist()) if token != eos_id]
                if eos_id is not None
                else rows
            )
            if not keep:
                return
            if len(keep) < len(rows):  # a row that has ended leaves the batch
                rows, (tokens, lengths, pads, ids) = (
                    [rows[i] for i in keep],
                    (x[keep] for x in (tokens, lengths, pads, ids)),
                )
            ids = (
                tokens[:, None]
                if use_cache
                else torch.cat((ids, ids[:, :1]), dim=1).scatter(
                    1, lengths[:, None], tokens[:, None]
                )
            )
            lengths = lengths + 1

    def _think(self, ids, span, cache, budget, halt, threshold):
        """One pass of a span of N rows: encode, loop until each row stops, decode. -> last logits (N, V), loops [N], q (N,)"""
        parts = [self.encoder, self._loop, self.decoder.last]
        encode, loop, decode = (
            self.compiled
            if self.compiled and cache and ids.shape[1] == 1 and span.rows is None
            else parts
        )
        h, N, live, all_span, all_decode, logits = (
            encode(ids, span, cache and cache.encoder),
            len(ids),
            [*range(len(ids))],
            span,
            decode,
            None,
        )
        at, loops, q, doubt = (
            torch.arange(N, device=h.device),
            [budget] * N,
            torch.zeros(N, device=h.device),
            torch.ones(N, device=h.device),
        )
        for b in range(budget):  # h, q, doubt and logits of a row that has stopped stay as they are
            before = h[at]
            after, new_q = loop(
                before, span, cache and cache.reasoning[min(b, len(cache.reasoning) - 1)]
            )
            h, q = h.index_copy(0, at, after), q.index_copy(0, at, new_q.sigmoid().float())
            doubt = doubt.index_copy(0, at, doubt[at] * (1 - q[at]))  # Π (1 - qʲ)
            if (
                halt in ("argmax", "kl")
            ):  # these decode at every loop; D's entry in the cache is overwritten, so the last one stands
                new = decode(after, span, cache and cache.decoder).float().log_softmax(-1)
                old, logits = (
                    new if b == 0 else logits[at],
                    new if b == 0 else logits.index_copy(0, at, new),
                )
            if b == budget - 1 or halt == "none" or (b == 0 and halt in ("argmax", "kl")):
                continue
            stop = {
                "confidence": lambda: q[at] >= threshold,
                "cdf": lambda: 1 - doubt[at] >= threshold,
                "convergence": lambda: span.tail(after - before).float().norm(dim=-1) <= threshold,
                "argmax": lambda: new.argmax(-1) == old.argmax(-1),
                "kl": lambda: (
                    F.kl_div(old, new, reduction="none", log_target=True).sum(-1) <= threshold
                ),
            }[halt]().tolist()
            if any(stop):  # tolist was this loop's one wait for the device
                done, keep = (
                    [i for i in range(len(live)) if stop[i] == wanted] for wanted in (True, False)
                )
                loops = [
                    b + 1 if row in (live[i] for i in done) else n for row, n in enumerate(loops)
                ]
                if cache and len(cache.reasoning) > 1:
                    cache.fill(b + 1, span.take(done))
                if not keep:
                    break
                live, span, (_, loop, decode) = [live[i] for i in keep], span.take(keep), parts
                at = torch.tensor(live, device=h.device)
        return (
            all_decode(h, all_span, cache and cache.decoder) if logits is None else logits,
            loops,
            q,
        )
