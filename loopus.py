"""LoopUS, the whole model: a pretrained language model recast into a looped one (arXiv 2605.11011).

                     ┌──────────── B times ────────────┐
                     ▼                                 │
    ids ─► E ─ h⁰ ─► hᵇ ─► M ─► M(hᵇ) ─► gate ─► hᵇ⁺¹ ─┴─► D ─► logits
                     │            │        ▲     (stop once q ≥ q_th)
                     └─── − ──────┴─► δ ───┴─► head ─► q

The first layers of the pretrained model encode once (E), its middle layers become one block that is run again and again
(M), its last layers decode (D). A selective gate decides, per token and channel, how much of the block's proposal enters
the state; a confidence head says when to stop. Nothing else is new: no h⁰ is injected again, loops carry no index, and
the rotary angles are the same at every loop.

    paper           here                              equation
    E               Encoder, LoopUS.encode            1
    M, hᵇ⁺¹         Reasoning, LoopUS.loop            2
    δ, Δ, α         Gate                              3, 4
    hᵇ⁺¹            LoopUS._loop                      5
    q               q_head, on δ of the last token    9
    D               Decoder, LoopUS.decode            -
    B               config.loops, budget              -
    q_th            config.exit_threshold             9
    KV cache        Cache, Block                      14-19 (App. A.4)
    loss            train.training_step               10-13

Letters of shapes: N rows of a batch, T tokens, D channels (hidden_size), V vocabulary, H query heads, G key/value heads,
K channels of a head (head_dim), L layers of a stack, S slots of a cache, B loops.

Pretrained parts carry Hugging Face's names, added parts the published LoopUS checkpoints' names: `state_dict()` is the file.
Read it in order; every function uses only what stands above it.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what, where, found, expected, what to do."""


@dataclass
class LoopUSConfig:
    """Shape of the backbone (Hugging Face's field names) and of the recast. Raises InputError if they contradict."""
    model_type: str = "llama"                # or "qwen3", which normalises each head's queries and keys
    vocab_size: int = 32000
    hidden_size: int = 2048                  # D
    intermediate_size: int = 5632
    num_hidden_layers: int = 22
    num_attention_heads: int = 32            # H
    num_key_value_heads: int | None = None   # G; None: H
    head_dim: int | None = None              # K; None: D / H. Qwen3's is not D / H
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    encoder_layers: int = 1                  # layers of E; D has the last `decoder_layers`, M the rest
    decoder_layers: int = 1
    loops: int = 20                          # B
    exit_threshold: float = 0.6              # q_th
    base_model: str = ""                     # where the backbone came from, for the record
    recast: bool = False                     # loaded from a LoopUS checkpoint, not fresh from a backbone

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.model_type not in ("llama", "qwen3"):
            raise InputError(f"model_type {self.model_type!r} is not supported; llama and qwen3 are")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(f"num_attention_heads {self.num_attention_heads} is no multiple of num_key_value_heads {self.num_key_value_heads}")
        if self.head_dim % 2:
            raise InputError(f"head_dim {self.head_dim} is odd; rotary positions need pairs")
        if min(self.encoder_layers, self.decoder_layers, self.reasoning_layers) < 1:
            raise InputError(f"split {self.encoder_layers},{self.decoder_layers} of {self.num_hidden_layers} layers: "
                             "encoder, reasoning block and decoder each need a layer")

    @property
    def reasoning_layers(self):
        return self.num_hidden_layers - self.encoder_layers - self.decoder_layers


def wide(x):
    """x in fp32, or as it is where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- the backbone: one Llama or Qwen3 layer ------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """x / rms(x) * weight, the norm taken in fp32 whatever the model's dtype."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        y = wide(x)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotary_angles(positions, config, dtype):
    """cos and sin of every position's angles: (..., T) -> two (..., T, K), to be broadcast over heads."""
    powers = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    angles = positions[..., None].float() / config.rope_theta ** powers    # (..., T, K/2)
    angles = torch.cat((angles, angles), dim=-1)                           # pair i is channels i and i + K/2
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + K/2]) by its angle. Hugging Face's split halves, not interleaved pairs: (N, H, T, K)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


@dataclass
class Block:
    """A block of tokens on its way through the layers: where it stands and what it may attend to.

    A block of one token is a decoding step: it attends to the cache. A longer one is a prompt: it attends to itself.
    """
    cos: torch.Tensor                        # (N or 1, 1, T, K)
    sin: torch.Tensor
    mask: torch.Tensor | None = None         # True: may attend; (T, T) or (N, 1, 1, width). None: all that is causal
    last: torch.Tensor | None = None         # (N,) index of each row's last valid token; None: T - 1
    rows: torch.Tensor | None = None         # (N,) the rows of the cache that the block's rows stand for
    slot: torch.Tensor | None = None         # one token: (N,) the slot it takes. A prompt: (N, S) the token each slot takes
    width: int = 0                           # slots of the cache in use

    def take(self, on):
        """The same block with rows `on` only."""
        row = lambda x: x if x is None or x.shape[0] == 1 else x[on]
        mask = self.mask if self.mask is None or self.mask.dim() == 2 else self.mask[on]
        return replace(self, cos=row(self.cos), sin=row(self.sin), mask=mask, last=self.last[on], rows=self.rows[on], slot=self.slot[on])

    def tail(self, x):
        """Each row's last valid token: (N, T, D) -> (N, D)."""
        return x[:, -1] if self.last is None else x[torch.arange(len(x), device=x.device), self.last]

    def remember(self, kv, k, v):
        """Write the block's keys and values (N, G, T, K) into one layer's cache (2, rows, G, S, K); return those to attend to."""
        if k.shape[2] > 1:                   # a prompt: every slot takes the last token that falls to it
            slot = self.slot[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
            kv[0, self.rows, :, :slot.shape[2]], kv[1, self.rows, :, :slot.shape[2]] = k.gather(2, slot), v.gather(2, slot)
            return k, v
        kv[0, self.rows, :, self.slot], kv[1, self.rows, :, self.slot] = k[:, :, 0], v[:, :, 0]
        seen = kv[:, :, :, :self.width]
        return seen if len(self.rows) == kv.shape[1] else seen[:, self.rows]


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; Qwen3 also normalises each head's queries and keys."""

    def __init__(self, config):
        super().__init__()
        D, K, self.head_dim = config.hidden_size, config.head_dim, config.head_dim
        self.q_proj = nn.Linear(D, config.num_attention_heads * K, bias=False)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * K, bias=False)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * K, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * K, D, bias=False)
        qwen3 = config.model_type == "qwen3"
        self.q_norm = RMSNorm(K, config.rms_norm_eps) if qwen3 else nn.Identity()
        self.k_norm = RMSNorm(K, config.rms_norm_eps) if qwen3 else nn.Identity()

    def forward(self, x, block, kv=None):
        heads = lambda y: y.unflatten(-1, (-1, self.head_dim))
        q = self.q_norm(heads(self.q_proj(x))).transpose(1, 2)          # (N, H, T, K)
        k = self.k_norm(heads(self.k_proj(x))).transpose(1, 2)          # (N, G, T, K)
        v = heads(self.v_proj(x)).transpose(1, 2)
        q, k = rotate(q, block.cos, block.sin), rotate(k, block.cos, block.sin)
        if kv is not None:
            k, v = block.remember(kv, k, v)                             # (N, G, S, K) when decoding
        causal = block.mask is None and x.shape[1] > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=block.mask, is_causal=causal, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))                # (N, T, D)


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
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, block, kv=None):
        x = x + self.self_attn(self.input_layernorm(x), block, kv)
        return x + self.mlp(self.post_attention_layernorm(x))


class Layers(nn.ModuleList):
    """A stack of layers; its cache is (L, 2, rows, G, S, K)."""

    def __init__(self, config, count):
        super().__init__(Layer(config) for _ in range(count))

    def forward(self, x, block, kv=None):
        for i, layer in enumerate(self):
            x = layer(x, block, None if kv is None else kv[i])
        return x


# ---- what LoopUS adds: the gate, and three names for the parts ------------------------------------------------------

class Gate(nn.Module):
    """Selective gate: how far each channel of each token opens to the proposal M(h), from δ = M(h) - h (eq. 3, 4).

    Mamba's step size, with a state of one: Δ = softplus(W_Δ δ + b_Δ), W_Δ of rank r = ceil(D / 16), and α = exp(Δ ⊙ A) with
    A = -exp(A_log). In the gate's own dtype (fp32), whatever the model's.
    """

    def __init__(self, config):
        super().__init__()
        D, r = config.hidden_size, math.ceil(config.hidden_size / 16)
        self.dt_input_proj = nn.Linear(D, r, bias=False)
        self.delta_proj = nn.Linear(r, D)
        self.A_log = nn.Parameter(torch.empty(D))
        if not self.A_log.is_meta:           # load_weights builds without memory and fills afterwards
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, init="paper"):
        """`paper`: the released initialisation; mean α at δ = 0 is 0.25 at D = 576, 0.05 at D = 4096: mostly shut.
        `open`: α = 0.9 in every channel, whatever δ: one loop is nearly the pretrained model, since a mix that is the same in
        every channel hardly moves the direction of h, which is all that the next norm sees."""
        if init not in ("paper", "open"):
            raise InputError(f"gate init {init!r}: expected paper or open")
        D, r = self.delta_proj.weight.shape
        self.dt_input_proj.reset_parameters()
        if init == "paper":
            nn.init.uniform_(self.delta_proj.weight, -r ** -0.5, r ** -0.5)
            dt = torch.empty(D).uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
            self.A_log.copy_(torch.arange(1, D + 1).log())
        else:
            nn.init.zeros_(self.delta_proj.weight)
            dt = torch.full((D,), -math.log(0.9))
            nn.init.zeros_(self.A_log)
        self.delta_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))   # so that softplus(bias) = dt

    def forward(self, delta):
        """δ (N, T, D) -> α (N, T, D) in (0, 1)."""
        step = F.softplus(self.delta_proj(self.dt_input_proj(delta)))   # Δ, eq. 3
        return torch.exp(-step * self.A_log.exp())                      # α, eq. 4


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = Layers(config, config.encoder_layers)

    def forward(self, ids, block, kv=None):
        return self.layers(self.embed_tokens(ids), block, kv)           # (N, T) -> (N, T, D)


class Reasoning(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = Layers(config, config.reasoning_layers)
        self.gate = Gate(config)


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = Layers(config, config.decoder_layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)   # untied: a copy of a tied embedding, trained alone

    def head(self, h):
        return self.lm_head(self.norm(h))                               # (..., D) -> (..., V)


# ---- generation: the caches, the stopping rules, the sampling -------------------------------------------------------

class Cache:
    """Keys and values of all tokens so far: one slot set for E, one per loop depth for M, one for D (eq. 14-19).

    At depth b a token attends, for every earlier token, to the keys and values that one made at depth b, or at its last
    depth if it stopped before (`fill`). With `depths` = 1 every loop overwrites the token's own entry instead (kv="shared").
    S slots are a ring: with a window, the newest token takes the place of the oldest.
    """

    def __init__(self, config, rows, size, depths, like):
        shape = (2, rows, config.num_key_value_heads, size, config.head_dim)
        self.encoder = like.new_zeros(config.encoder_layers, *shape)                     # (L, 2, N, G, S, K)
        self.reasoning = like.new_zeros(depths, config.reasoning_layers, *shape)         # (B, L, 2, N, G, S, K)
        self.decoder = like.new_zeros(config.decoder_layers, *shape)

    def fill(self, loops, block):
        """The block's rows stopped after `loops` loops: its keys and values at the last of them stand for all deeper ones."""
        kv, rows = self.reasoning, block.rows
        if block.slot.dim() == 2:            # a prompt
            kv[loops:, :, :, rows] = kv[loops - 1:loops, :, :, rows]
        else:
            kv[loops:, :, :, rows, :, block.slot] = kv[loops - 1:loops, :, :, rows, :, block.slot]


@dataclass
class Step:
    """One new token a row. A row that has ended gives eos_id, 0 loops and confidence 0."""
    tokens: torch.Tensor                     # (N,)
    loops: torch.Tensor                      # (N,) loops run by the pass that produced the token
    confidence: torch.Tensor                 # (N,) q after the last of them


HALTS = ("confidence", "convergence", "cdf", "argmax", "kl", "none")


def sample(logits, noise, temperature, top_k, top_p):
    """Next tokens (N,) from logits (N, V). `noise`: one random generator a row, so that a row draws what it draws alone."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf)
    if top_p is not None:                    # the smallest set of tokens that holds top_p of the probability
        p, order = logits.softmax(-1).sort(descending=True, stable=True)
        drop = (p.cumsum(-1) - p >= top_p).scatter(-1, order, p.cumsum(-1) - p >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    waits = torch.stack([torch.empty_like(logits[0]).exponential_(generator=g) for g in noise])
    return (logits.softmax(-1) / waits).argmax(-1)   # the first of V exponential clocks to ring, rates p: a draw from p


# ---- the model ------------------------------------------------------------------------------------------------------

class LoopUS(nn.Module):
    """E, M with its gate, D and the confidence head. Its module tree is the published checkpoints' layout."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder, self.reasoning, self.decoder = Encoder(config), Reasoning(config), Decoder(config)
        self.q_head = nn.Sequential(nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, 1))

    def encode(self, ids):
        """h⁰ = E(x): (N, T) -> (N, T, D). Eq. 1."""
        return self.encoder(ids, self._block(*ids.shape[-2:]))

    def loop(self, h):
        """One gated pass of M: (N, T, D) -> hᵇ⁺¹ (N, T, D) and the confidence's logit (N,). Eq. 2-5, 9."""
        return self._loop(h, self._block(*h.shape[:2]))

    def decode(self, h):
        """D(h): (N, T, D) -> logits (N, T, V)."""
        return self.decoder.head(self.decoder.layers(h, self._block(*h.shape[:2])))

    def forward(self, ids, loops=None):
        """Logits (N, T, V) after exactly `loops` loops (None: config.loops)."""
        loops = self.config.loops if loops is None else loops
        if loops < 1:
            raise InputError(f"loops {loops}: expected 1 or more")
        h = self.encode(ids)
        for _ in range(loops):
            h, _ = self.loop(h)
        return self.decode(h)

    def forward_pretrained(self, ids):
        """Logits (N, T, V) of the backbone as it was loaded: E, M once without the gate, D."""
        return self.decode(self.pretrained_loop(self.encode(ids)))

    def pretrained_loop(self, h):
        """M(h), without the gate: (N, T, D) -> (N, T, D)."""
        return self.reasoning.layers(h, self._block(*h.shape[:2]))

    def _block(self, N, T, window=None, **where):
        """A block of T tokens from position 0 on. Beyond a window of W, token i attends to i - W + 1 … i only."""
        weight = self.decoder.norm.weight
        positions = torch.arange(T, device=weight.device)
        ago = positions[:, None] - positions
        mask = (ago >= 0) & (ago < window) if window is not None and window < T else None
        cos, sin = rotary_angles(positions, self.config, weight.dtype)
        return Block(cos[None, None], sin[None, None], mask, **where)

    def _loop(self, h, block, kv=None):
        gate = self.reasoning.gate
        m, state = (x.to(gate.A_log.dtype) for x in (self.reasoning.layers(h, block, kv), h))
        delta = m - state                                       # δ = M(h) - h, eq. 3
        alpha = gate(delta)                                     # eq. 3, 4
        mixed = alpha * m + (1 - alpha) * state                 # eq. 5
        return mixed.to(h.dtype), self.q_head(block.tail(delta)).squeeze(-1)

    def generate(self, ids, max_new_tokens, *, lengths=None, budget=8, exit_threshold=0.6, halt="confidence", kv="latest",
                 temperature=1.0, top_k=None, top_p=None, eos_id=None, seed=None, use_cache=True, window=None):
        """Continue prompts; an iterator of `Step`, one a new token.

        ids (N, T), padded on the right; lengths (N,) the valid tokens of each row (None: all). A token's pass runs up to
        `budget` loops and stops by `halt`, each row by itself; a prompt is one block that stops by its last token:
          confidence   q >= exit_threshold (eq. 9)
          convergence  ‖hᵇ - hᵇ⁻¹‖₂ <= exit_threshold          } App. E
          cdf          1 - Π (1 - qʲ) >= exit_threshold        }
          argmax       the most likely token did not change
          kl           KL(pᵇ ‖ pᵇ⁻¹) <= exit_threshold, in nats
          none         never: exactly `budget` loops
        kv: `latest` keeps keys and values per loop depth, `shared` one set (see Cache). temperature 0: argmax. Row r draws
        with seed + r. eos_id ends a row; None: never. window: a token attends to the last `window` tokens, itself included
        (None: max_position_embeddings). use_cache=False computes every prefix anew, all its tokens looping together.
        Raises InputError for arguments out of range.
        """
        lengths = [ids.shape[-1]] * len(ids) if lengths is None else torch.as_tensor(lengths).tolist()
        window = self.config.max_position_embeddings if window is None else window
        unit = halt in ("confidence", "cdf")
        for ok, problem in (
                (ids.dim() == 2 and ids.numel() > 0, f"ids of shape {tuple(ids.shape)}: expected (rows, tokens), neither empty"),
                (len(lengths) == len(ids) and all(1 <= n <= ids.shape[-1] for n in lengths), f"lengths {lengths}: expected one a row, each 1 to {ids.shape[-1]}"),
                (budget >= 1, f"budget {budget}: expected 1 or more"),
                (max_new_tokens >= 0, f"max_new_tokens {max_new_tokens}: expected 0 or more"),
                (halt in HALTS, f"halt {halt!r}: expected one of {', '.join(HALTS)}"),
                (kv in ("latest", "shared"), f"kv {kv!r}: expected latest or shared"),
                (0 <= exit_threshold <= (1 if unit else math.inf), f"exit_threshold {exit_threshold}: expected {'0 to 1' if unit else '0 or more'} for halt={halt!r}"),
                (temperature >= 0, f"temperature {temperature}: expected 0 or more"),
                (top_k is None or top_k >= 1, f"top_k {top_k}: expected 1 or more"),
                (top_p is None or 0 < top_p <= 1, f"top_p {top_p}: expected more than 0, at most 1"),
                (window >= 1, f"window {window}: expected 1 or more")):
            if not ok:
                raise InputError(problem)
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise InputError(f"token ids {ids.min().item()} to {ids.max().item()}: the vocabulary is 0 to {self.config.vocab_size - 1}")
        seed = torch.seed() if seed is None else seed
        noise = [torch.Generator(ids.device).manual_seed(seed + r) for r in range(len(ids))]
        stopping = dict(budget=budget, halt=halt, threshold=exit_threshold)
        return self._generate(ids, torch.tensor(lengths), max_new_tokens, stopping, kv, lambda logits, rows: sample(
            logits, [noise[r] for r in rows.tolist()], temperature, top_k, top_p), eos_id, use_cache, window)

    @torch.inference_mode()
    def _generate(self, ids, lengths, max_new_tokens, stopping, kv, draw, eos_id, use_cache, window):
        (N, T), device = ids.shape, ids.device
        rows, lengths, longest = torch.arange(N, device=device), lengths.to(device), T
        size = min(window, T + max_new_tokens)
        cache = Cache(self.config, N, size, stopping["budget"] if kv == "latest" else 1, self.decoder.norm.weight) if use_cache else None
        slots = torch.arange(size, device=device)
        for step in range(max_new_tokens):
            if step == 0 or not use_cache:              # everything so far as one block; slot s takes the last token that is s modulo S
                taken = slots + size * ((lengths[:, None] - 1 - slots) // size)
                block = self._block(len(ids), ids.shape[1], window, last=lengths - 1, rows=rows, slot=taken.clamp(0, ids.shape[1] - 1), width=size)
                now = ids
            if use_cache and (step > 0 or T == 1):      # one token a row, at position lengths - 1
                cos, sin = rotary_angles(lengths[:, None, None] - 1, self.config, self.decoder.norm.weight.dtype)
                width = min(size, longest)
                mask = slots[:width] < lengths[:, None, None, None]
                block = Block(cos, sin, mask, torch.zeros_like(lengths), rows, (lengths - 1) % size, width)
                now = ids.gather(1, lengths[:, None] - 1)
            logits, loops, confidence = self._think(now, block, cache, **stopping)
            tokens = draw(logits, rows)
            yield Step(*(torch.full((N,), fallback, dtype=x.dtype, device=device).index_copy(0, rows, x)
                         for x, fallback in ((tokens, eos_id or 0), (loops, 0), (confidence, 0.0))))
            if eos_id is not None:
                going = tokens != eos_id                # a row that has ended leaves the batch
                rows, ids, lengths, tokens = rows[going], ids[going], lengths[going], tokens[going]
                if len(rows) == 0:
                    return
            ids = torch.cat((ids, ids[:, :1]), dim=1).scatter(1, lengths[:, None], tokens[:, None])
            lengths, longest = lengths + 1, longest + 1

    def _think(self, ids, block, cache, budget, halt, threshold):
        """One pass of a block of N rows: encode, loop until each row stops, decode. -> last logits (N, V), loops (N,), q (N,)"""
        h = self.encoder(ids, block, cache and cache.encoder)                  # (N, T, D)
        N, device = len(ids), ids.device
        on = torch.arange(N, device=device)                                    # rows still looping
        loops, confidence = torch.full((N,), budget, device=device), torch.zeros(N, device=device)
        doubt, logits = torch.ones(N, device=device), None                     # Π (1 - qʲ)

        def decode(h, block):
            return self.decoder.head(block.tail(self.decoder.layers(h, block, cache and cache.decoder)))

        here = block
        for b in range(budget):
            depth = cache and cache.reasoning[min(b, len(cache.reasoning) - 1)]
            before = h[on]
            after, q = self._loop(before, here, depth)
            q = q.sigmoid().float()
            h = h.index_copy(0, on, after)
            confidence[on] = q
            doubt[on] *= 1 - q
            if halt in ("argmax", "kl"):
                new = decode(after, here)
                old, logits = logits, new if logits is None else logits.index_copy(0, on, new)
            if halt == "none" or b == budget - 1:
                continue
            if halt == "confidence":
                stop = q >= threshold
            elif halt == "convergence":
                stop = here.tail(after - before).float().norm(dim=-1) <= threshold
            elif halt == "cdf":
                stop = 1 - doubt[on] >= threshold
            elif old is None:
                continue
            elif halt == "argmax":
                stop = new.argmax(-1) == old[on].argmax(-1)
            else:
                stop = F.kl_div(old[on].float().log_softmax(-1), new.float().log_softmax(-1), log_target=True, reduction="none").sum(-1) <= threshold
            done, on = on[stop], on[~stop]
            if len(done):
                loops[done] = b + 1
                if cache and len(cache.reasoning) > 1:
                    cache.fill(b + 1, block.take(done))
                here = block.take(on)
            if len(on) == 0:
                break
        return decode(h, block) if logits is None else logits, loops, confidence
