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

class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what, where, found, expected, what to do."""

def require(ok, problem):
    if not ok:
        raise InputError(problem)

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
    from_checkpoint: bool = False            # loaded from a LoopUS checkpoint, so gate and head are not fresh

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.reasoning_layers = self.num_hidden_layers - self.encoder_layers - self.decoder_layers
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        require(self.model_type in ("llama", "qwen3"), f"model_type {self.model_type!r} is not supported; llama and qwen3 are")
        require(heads % groups == 0, f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}")
        require(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd; rotary positions need pairs")
        require(min(self.encoder_layers, self.decoder_layers, self.reasoning_layers) >= 1,
                f"split {self.encoder_layers},{self.decoder_layers} of {self.num_hidden_layers} layers: "
                "encoder, reasoning block and decoder each need a layer")

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
class Span:
    """Tokens on their way through the layers together: where they stand and what they may attend to. With a cache, a span of one
    token is a decoding step and attends to the cache; a longer one is a prompt and attends to itself."""
    cos: torch.Tensor                        # (N or 1, 1, T, K)
    sin: torch.Tensor
    mask: torch.Tensor | None = None         # True: may attend; (T, T) or (N, 1, 1, width). None: all that is causal
    last: torch.Tensor | None = None         # (N,) index of each row's last valid token; None: T - 1
    rows: torch.Tensor | None = None         # (N,) the rows of the cache that its rows stand for
    slot: torch.Tensor | None = None         # one token: (N,) the slot it is written to. A prompt: (N, S) the token each slot stores
    width: int = 0                           # slots of the cache in use

    def take(self, active):
        """The same span with rows `active` only."""
        pick = lambda x: x[active] if x is not None and x.dim() == 4 and len(x) > 1 else x      # not what all rows share
        return replace(self, cos=pick(self.cos), sin=pick(self.sin), mask=pick(self.mask),
                       last=self.last[active], rows=self.rows[active], slot=self.slot[active])

    def tail(self, x):
        """Each row's last valid token: (N, T, D) -> (N, D)."""
        return x[:, -1] if self.last is None else x[torch.arange(len(x), device=x.device), self.last]

    def remember(self, kv, k, v):
        """Write the span's keys and values (N, G, T, K) into one layer's cache (2, rows, G, S, K); return those to attend to."""
        if k.shape[2] > 1:                   # a prompt: every slot takes the last token that falls to it
            slot = self.slot[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
            kv[0, self.rows], kv[1, self.rows] = k.gather(2, slot), v.gather(2, slot)
            return k, v
        kv[0, self.rows, :, self.slot], kv[1, self.rows, :, self.slot] = k[:, :, 0], v[:, :, 0]
        seen = kv[:, :, :, :self.width]
        return seen if len(self.rows) == kv.shape[1] else seen[:, self.rows]

class Attention(nn.Module):
    """Grouped-query attention with rotary positions; Qwen3 also normalises each head's queries and keys."""

    def __init__(self, config):
        super().__init__()
        D, H, G, self.head_dim = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        K = self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, heads * K, bias=False) for heads in (H, G, G))
        self.o_proj = nn.Linear(H * K, D, bias=False)
        norm = (lambda: RMSNorm(K, config.rms_norm_eps)) if config.model_type == "qwen3" else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x, span, kv=None):
        heads = lambda y: y.unflatten(-1, (-1, self.head_dim))
        q = self.q_norm(heads(self.q_proj(x))).transpose(1, 2)          # (N, H, T, K)
        k = self.k_norm(heads(self.k_proj(x))).transpose(1, 2)          # (N, G, T, K)
        v = heads(self.v_proj(x)).transpose(1, 2)
        q, k = rotate(q, span.cos, span.sin), rotate(k, span.cos, span.sin)
        if kv is not None:
            k, v = span.remember(kv, k, v)                             # (N, G, S, K) when decoding
        y = F.scaled_dot_product_attention(q, k, v, span.mask, is_causal=span.mask is None and x.shape[1] > 1, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))                # (N, T, D)

class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        D, I = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = nn.Linear(D, I, bias=False), nn.Linear(D, I, bias=False)
        self.down_proj = nn.Linear(I, D, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, span, kv=None):
        x = x + self.self_attn(self.input_layernorm(x), span, kv)
        return x + self.mlp(self.post_attention_layernorm(x))

class Layers(nn.ModuleList):
    """A stack of layers; its cache is (L, 2, rows, G, S, K)."""

    def __init__(self, config, count):
        super().__init__(Layer(config) for _ in range(count))

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
        if not self.A_log.is_meta:           # load_weights builds without memory and fills afterwards
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, init="paper"):
        """`paper`: the released initialisation; mean α at δ = 0 is 0.25 at D = 576, 0.05 at D = 4096: mostly shut.
        `open`: α = 0.9 in every channel, whatever δ: the loss after one loop is the pretrained one within 2 % (docs/smollm2.md)."""
        require(init in ("paper", "open"), f"gate init {init!r}: expected paper or open")
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

    def forward(self, ids, span, kv=None):
        return self.layers(self.embed_tokens(ids), span, kv)           # (N, T) -> (N, T, D)

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

    def logits(self, h):
        return self.lm_head(self.norm(h))                               # (..., D) -> (..., V)

# ---- generation: the caches, the stopping rules, the sampling -------------------------------------------------------
HALTS = ("confidence", "convergence", "cdf", "argmax", "kl", "none")

class Cache:
    """Keys and values of all tokens so far: one set for E, one per loop depth for M, one for D (eq. 14-19). At depth b a token
    attends, for every earlier token, to what that one made at depth b, or at its last depth if it stopped before (`fill`). With
    one depth (kv="shared") every loop overwrites the token's own entry. S slots are a ring: the newest takes the oldest's place."""

    def __init__(self, config, rows, size, depths, like):
        shape = (2, rows, config.num_key_value_heads, size, config.head_dim)
        self.encoder = like.new_zeros(config.encoder_layers, *shape)                     # (L, 2, N, G, S, K)
        self.reasoning = like.new_zeros(depths, config.reasoning_layers, *shape)         # (B, L, 2, N, G, S, K)
        self.decoder = like.new_zeros(config.decoder_layers, *shape)

    def fill(self, loops, span):
        """The span's rows stopped after `loops` loops: its keys and values at the last of them stand for all deeper ones."""
        kv, rows = self.reasoning, span.rows
        if span.slot.dim() == 2:            # a prompt
            kv[loops:, :, :, rows] = kv[loops - 1:loops, :, :, rows]
        else:
            kv[loops:, :, :, rows, :, span.slot] = kv[loops - 1:loops, :, :, rows, :, span.slot]

@dataclass
class Step:
    """One new token a row. A row that has ended gives eos_id, 0 loops and confidence 0."""
    tokens: torch.Tensor                     # (N,)
    loops: torch.Tensor                      # (N,) loops run by the pass that produced the token
    confidence: torch.Tensor                 # (N,) q after the last of them

def sample(logits, noise, temperature, top_k, top_p):
    """Next tokens (N,) from logits (N, V). `noise`: one random generator a row, so that a row draws what it draws alone."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf)
    if top_p is not None:                    # the smallest set of tokens that holds top_p of the probability
        p, order = logits.softmax(-1).sort(descending=True, stable=True)
        drop = p.cumsum(-1) - p >= top_p
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
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
        mask = (ago >= 0) & (ago < window) if window is not None and window < T else None
        cos, sin = rotary_angles(positions, self.config, weight.dtype)
        return Span(cos[None, None], sin[None, None], mask, **where)

    def _loop(self, h, span, kv=None):
        gate = self.reasoning.gate
        m, state = (x.to(gate.A_log.dtype) for x in (self.reasoning.layers(h, span, kv), h))
        delta = m - state                                       # δ = M(h) - h, eq. 3
        alpha = gate(delta)                                     # eq. 3, 4
        mixed = alpha * m + (1 - alpha) * state                 # eq. 5
        return mixed.to(h.dtype), self.q_head(span.tail(delta)).squeeze(-1)

    def generate(self, ids, max_new_tokens, *, lengths=None, budget=8, exit_threshold=0.6, halt="confidence", kv="latest",
                 temperature=1.0, top_k=None, top_p=None, eos_id=None, seed=None, use_cache=True, window=None):
        """Continue prompts; an iterator of `Step`, one a new token.

        ids (N, T), padded on the right; lengths (N,) the valid tokens of each row (None: all). A token's pass runs up to
        `budget` loops and stops by `halt`, each row by itself; a prompt's tokens stop together, by the last one:
          confidence   q >= exit_threshold (eq. 9)
          convergence  ‖hᵇ - hᵇ⁻¹‖₂ <= exit_threshold          } App. E
          cdf          1 - Π (1 - qʲ) >= exit_threshold        }
          argmax       the most likely token did not change
          kl           KL(pᵇ ‖ pᵇ⁻¹) <= exit_threshold, in nats
          none         never: exactly `budget` loops
        kv: `latest` keeps keys and values per loop depth, `shared` one set (see Cache). temperature 0: argmax. Row r draws
        with seed + r. eos_id ends a row; None: never. window: a token attends to the last `window` tokens, itself included
        (None: max_position_embeddings). use_cache=False computes every prefix anew, its tokens together. Raises InputError.
        """
        ids, lengths = ids.long(), [ids.shape[-1]] * len(ids) if lengths is None else torch.as_tensor(lengths).tolist()
        window = self.config.max_position_embeddings if window is None else window
        top = 1 if halt in ("confidence", "cdf") else math.inf
        require(ids.dim() == 2 and ids.numel() > 0, f"ids of shape {tuple(ids.shape)}: expected (rows, tokens), neither empty")
        require(len(lengths) == len(ids) and all(1 <= n <= ids.shape[-1] for n in lengths),
                f"lengths {lengths}: expected one a row, each from 1 to {ids.shape[-1]}")
        require(0 <= ids.min() and ids.max() < self.config.vocab_size,
                f"token ids from {ids.min()} to {ids.max()}: the vocabulary is 0 to {self.config.vocab_size - 1}")
        require(halt in HALTS, f"halt {halt!r}: expected one of {', '.join(HALTS)}")
        require(kv in ("latest", "shared"), f"kv {kv!r}: expected latest or shared")
        require(0 <= exit_threshold <= top, f"exit_threshold {exit_threshold}: expected 0 to {top} for halt {halt}")
        require(temperature >= 0, f"temperature {temperature}: expected 0 or more")
        require(top_p is None or 0 < top_p <= 1, f"top_p {top_p}: expected more than 0, at most 1")
        for name, value in (("budget", budget), ("max_new_tokens", max_new_tokens), ("top_k", top_k), ("window", window)):
            require(value is None or value >= (name != "max_new_tokens"), f"{name} {value}: too small")
        seed = torch.randint(2**62, ()).item() if seed is None else seed
        noise = [torch.Generator(ids.device).manual_seed(seed + r) for r in range(len(ids))]
        draw = lambda logits, rows: sample(logits, [noise[r] for r in rows.tolist()], temperature, top_k, top_p)
        stopping = {"budget": budget, "halt": halt, "threshold": exit_threshold}
        return self._generate(ids, torch.tensor(lengths), max_new_tokens, stopping, kv, draw, eos_id, use_cache, window)

    @torch.inference_mode()
    def _generate(self, ids, lengths, max_new_tokens, stopping, kv, draw, eos_id, use_cache, window):
        (N, T), device, dtype = ids.shape, ids.device, self.decoder.norm.weight.dtype
        rows, lengths, longest = torch.arange(N, device=device), lengths.to(device), T
        size = min(window, T + max_new_tokens)          # S
        slots = torch.arange(size, device=device)
        cache = Cache(self.config, N, size, stopping["budget"] if kv == "latest" else 1, self.decoder.norm.weight) if use_cache else None
        for step in range(max_new_tokens):
            if use_cache and (step > 0 or T == 1):      # one token a row, at position lengths - 1
                now, at, width = ids.gather(1, lengths[:, None] - 1), lengths - 1, min(size, longest)
                span = Span(*rotary_angles(at[:, None, None], self.config, dtype), slots[:width] <= at[:, None, None, None],
                            torch.zeros_like(at), rows, at % size, width)
            else:                                       # all so far; slot s stores the last position that is s modulo S, if any
                taken = slots + size * ((lengths[:, None] - 1 - slots) // size)
                now, span = ids, self._span(ids.shape[1], window, last=lengths - 1, rows=rows, slot=taken.clamp(0, ids.shape[1] - 1))
            logits, loops, confidence = self._think(now, span, cache, **stopping)
            tokens = draw(logits, rows)
            yield Step(*(torch.full((N,), fallback, dtype=x.dtype, device=device).index_copy(0, rows, x)
                         for x, fallback in ((tokens, eos_id or 0), (loops, 0), (confidence, 0.0))))
            if eos_id is not None:                      # a row that has ended leaves the batch
                rows, ids, lengths, tokens = (x[tokens != eos_id] for x in (rows, ids, lengths, tokens))
                if len(rows) == 0:
                    return
            ids = torch.cat((ids, ids[:, :1]), dim=1).scatter(1, lengths[:, None], tokens[:, None])
            lengths, longest = lengths + 1, longest + 1

    def _think(self, ids, span, cache, budget, halt, threshold):
        """One pass of a span of N rows: encode, loop until each row stops, decode. -> last logits (N, V), loops (N,), q (N,)"""
        def decode(h, span):
            return self.decoder.logits(span.tail(self.decoder.layers(h, span, cache and cache.decoder)))

        h, N, device = self.encoder(ids, span, cache and cache.encoder), len(ids), ids.device
        loops, confidence, not_stopped = torch.full((N,), budget, device=device), torch.zeros(N, device=device), torch.ones(N, device=device)
        active, active_span, logits = torch.arange(N, device=device), span, None    # rows still looping
        for b in range(budget):
            before = h[active]
            after, q = self._loop(before, active_span, cache and cache.reasoning[min(b, len(cache.reasoning) - 1)])
            h, q = h.index_copy(0, active, after), q.sigmoid().float()
            confidence[active] = q
            not_stopped[active] *= 1 - q                                            # Π (1 - qʲ)
            if halt in ("argmax", "kl"):     # these decode at every loop; D's entry in the cache is overwritten, so the last one stands
                new = decode(after, active_span).float().log_softmax(-1)
                old, logits = new if logits is None else logits[active], new if logits is None else logits.index_copy(0, active, new)
            if halt == "none" or b == budget - 1 or (b == 0 and halt in ("argmax", "kl")):
                continue
            stop = {"confidence": lambda: q >= threshold,
                    "convergence": lambda: active_span.tail(after - before).float().norm(dim=-1) <= threshold,
                    "cdf": lambda: 1 - not_stopped[active] >= threshold,
                    "argmax": lambda: new.argmax(-1) == old.argmax(-1),
                    "kl": lambda: F.kl_div(old, new, reduction="none", log_target=True).sum(-1) <= threshold}[halt]()
            if stop.any():
                done, active = active[stop], active[~stop]
                loops[done] = b + 1
                if cache and len(cache.reasoning) > 1:
                    cache.fill(b + 1, span.take(done))
                active_span = span.take(active)
                if len(active) == 0:
                    break
        return decode(h, span) if logits is None else logits, loops, confidence
