"""Parameters, bytes and FLOPs of a model on packs of groups: small pure functions of integers.

Notation: P prompt tokens, R response tokens of one rollout, G rollouts of a prompt. FLOPs count a
multiply-add as two. Bytes are exact for parameters and states and an upper estimate for activations.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalong.config.model_shape import ModelShape
from megalong.config.tree import Recompute

CHUNK_LOGITS = 1 << 26
"""Logits (rows * vocabulary of the rank) alive at once in the log-probability op."""
MLP_ROWS = 1 << 14
"""Rows that model.mlp_chunks=0 lets through an MLP at a time."""
OFFLOAD_DEVICE_LAYERS = 2
"""Layers whose kept activations are on the device at a time under model.offload_activations."""
STATE_PIECE_BYTES = 1 << 25
"""Most of each state of a parameter that is on the device in one piece under optimizer.offload."""
STATE_BUFFERS = 3
"""Pieces on the device at a time under optimizer.offload: on its way there, in its update, on its way back."""
WEIGHT_BUCKET_BYTES = 3 << 28
"""Weights that go to a rollout engine at a time; a larger tensor goes alone. One bucket is on its way while the next is
gathered, and a sync is to take less than 2 GB."""


def layer_matrix_params(shape: ModelShape) -> int:
    """Weights of one decoder layer's matrices: q, k, v, output, gate, up, down."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return shape.hidden * (2 * query + 2 * key) + 3 * shape.hidden * shape.ffn


def layer_vector_params(shape: ModelShape) -> int:
    """Biases of q, k, v and the weights of the norms of one decoder layer."""
    biases = (shape.heads + 2 * shape.kv_heads) * shape.head_dim if shape.qkv_bias else 0
    return biases + layer_norm_params(shape)


def layer_norm_params(shape: ModelShape) -> int:
    """Weights of the two norms of a decoder layer, and of those of its queries and keys."""
    return 2 * shape.hidden + (2 * shape.head_dim if shape.qk_norm else 0)


def head_params(shape: ModelShape) -> int:
    """Rows of the output head times its width (the embedding's own when tied)."""
    return shape.vocab * shape.hidden


def llm_params(shape: ModelShape) -> int:
    """All parameters of the LLM: embedding, layers, final norm, and the head unless it is tied."""
    per_layer = layer_matrix_params(shape) + layer_vector_params(shape)
    return shape.layers * per_layer + shape.hidden + head_params(shape) * (1 if shape.tied else 2)


def llm_params_per_rank(shape: ModelShape, *, tp: int, pp: int, stage: int = 0) -> int:
    """Parameters of a rank of a pipeline stage: matrices and biases split over tp, layers over pp, norms replicated.

    The first stage holds the embedding; the last one the final norm and the head, its own copy of it when it is tied.
    """
    norms = layer_norm_params(shape)
    per_layer = (layer_matrix_params(shape) + layer_vector_params(shape) - norms) // tp + norms
    first, last = stage == 0, stage == pp - 1
    tables = first + last - (shape.tied and pp == 1)
    return shape.layers // pp * per_layer + last * shape.hidden + tables * head_params(shape) // tp


def optimizer_params_per_rank(params: int, *, shards: int, largest: int) -> int:
    """Parameters whose optimizer state the fullest of `shards` ranks holds.

    State is dealt out parameter by parameter, so no rank holds less than one whole parameter: the
    fullest holds an even share, or the largest parameter when that is more.
    """
    return max(-(-params // shards), largest if shards > 1 else params)


def state_bytes_per_param(*, element: int) -> int:
    """Optimizer states: float32 master copy and both moments; a float32 parameter is its own master copy."""
    return 8 if element == 4 else 12


def state_buffer_bytes(*, element: int, largest: int) -> int:
    """What an update under optimizer.offload holds on the device: pieces of all states and one scaled gradient.

    largest: elements of the largest parameter.
    """
    piece = min(STATE_PIECE_BYTES, 4 * largest)
    return piece * (STATE_BUFFERS * state_bytes_per_param(element=element) // 4 + 1)


def bucket_bytes(shape: ModelShape, *, element: int) -> int:
    """Bytes of the largest bucket of the LLM's weights: one filled up or its largest tensor, of all tp ranks."""
    largest = max(head_params(shape), shape.hidden * shape.ffn)
    return min(element * llm_params(shape), max(WEIGHT_BUCKET_BYTES, element * largest))


def shared_tokens(prompt: int, response: int, group: int) -> int:
    """Tokens of a group as one pack: the prompt once, then every response."""
    return prompt + group * response


def repeated_tokens(prompt: int, response: int, group: int) -> int:
    """Tokens of the same group as separate sequences."""
    return group * (prompt + response)


def shared_pairs(prompt: int, response: int, group: int) -> int:
    """Query-key pairs of a pack: P(P+1)/2 + G(RP + R(R+1)/2)."""
    own = response * (response + 1) // 2
    return prompt * (prompt + 1) // 2 + group * (response * prompt + own)


def repeated_pairs(prompt: int, response: int, group: int) -> int:
    """Query-key pairs of separate causal sequences: G(P+R)(P+R+1)/2."""
    length = prompt + response
    return group * (length * (length + 1) // 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a forward goes over: rows of the layers, and pairs of a query and a key that it sees."""

    tokens: int
    pairs: int
    last_tokens: int  # in the last layer: behind the keys and values, which it has of all tokens
    last_pairs: int
    rows: int  # of the output head


def whole_work(*, tokens: int, pairs: int, rows: int) -> Work:
    """A sampler's forward: the last layer like the others."""
    return Work(tokens=tokens, pairs=pairs, last_tokens=tokens, last_pairs=pairs, rows=rows)


def shared_work(prompt: int, response: int, group: int) -> Work:
    """A pack: behind the last layer's keys there are the prompt's last token and all but the last of each response."""
    ahead = response - 1
    return Work(
        tokens=shared_tokens(prompt, response, group),
        pairs=shared_pairs(prompt, response, group),
        last_tokens=1 + group * ahead,
        last_pairs=prompt + group * (ahead * prompt + ahead * response // 2),
        rows=group * response,
    )


def video_work(video: int) -> Work:
    """What a pack has less of for each question that shares its video with another one: a video predicts nothing."""
    return Work(tokens=video, pairs=video * (video + 1) // 2, last_tokens=0, last_pairs=0, rows=0)


def repeated_work(prompt: int, response: int, group: int) -> Work:
    """The same group as separate sequences: the last token of every prompt."""
    return Work(
        tokens=repeated_tokens(prompt, response, group),
        pairs=repeated_pairs(prompt, response, group),
        last_tokens=group * response,
        last_pairs=group * (response * prompt + response * (response - 1) // 2),
        rows=group * response,
    )


def linear_flops(shape: ModelShape, work: Work) -> int:
    """Forward of all layers' matrices: 2 * weights * tokens, of which the last layer's keys and values take all."""
    keys = 2 * shape.hidden * shape.kv_heads * shape.head_dim
    weights = layer_matrix_params(shape)
    return 2 * (((shape.layers - 1) * weights + keys) * work.tokens + (weights - keys) * work.last_tokens)


def attention_flops(shape: ModelShape, work: Work) -> int:
    """Forward of scores and values over all layers: 4 * heads * head_dim per pair and layer."""
    return 4 * shape.heads * shape.head_dim * ((shape.layers - 1) * work.pairs + work.last_pairs)


def head_flops(shape: ModelShape, rows: int) -> int:
    """Forward of the output head on the rows that predict a response token."""
    return 2 * head_params(shape) * rows


def forward_flops(shape: ModelShape, work: Work) -> int:
    """One forward: linear + attention + head. A log-probability pass costs this."""
    return linear_flops(shape, work) + attention_flops(shape, work) + head_flops(shape, work.rows)


def train_flops(shape: ModelShape, work: Work, *, recompute: Recompute, mlp_chunks: int = 0) -> int:
    """Forward and backward: linear 3 forwards, attention 3.5 (flash backward is 2.5), head 4.

    Full recompute adds one forward of linear and attention, kept attention one of linear, and a sliced MLP its own even
    without either. The head's logits are never kept, so its backward makes them again: 4 forwards.
    """
    linear, attention = linear_flops(shape, work), attention_flops(shape, work)
    mlp_tokens = (shape.layers - 1) * work.tokens + work.last_tokens
    mlp = 2 * 3 * shape.hidden * shape.ffn * mlp_tokens if mlp_chunks > 1 else 0
    again = {Recompute.none: mlp, Recompute.keep_attention: linear, Recompute.full: linear + attention}[recompute]
    return 3 * linear + attention * 7 // 2 + again + 4 * head_flops(shape, work.rows)


def decode_flops(shape: ModelShape, *, prompt: int, response: int, group: int) -> int:
    """Sampling G responses token by token after the prefill: each token attends the prompt and its own past."""
    rows = group * response
    pairs = shared_pairs(prompt, response, group) - prompt * (prompt + 1) // 2
    return forward_flops(shape, whole_work(tokens=rows, pairs=pairs, rows=rows))


def kv_bytes_per_token(shape: ModelShape, *, element: int) -> int:
    """Keys and values of one token over all layers."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * element


def kept_bytes_per_token(
    shape: ModelShape, *, element: int, tp: int, sequence_parallel: bool, recompute: Recompute, sliced_mlp: bool = False
) -> int:
    """Activations one layer keeps per token of the pack until its backward, on one rank.

    Full recompute: the layer's input; keep_attention: also the attention output and a float32 log-sum-exp per head.
    Otherwise, in elements: width-sized (inputs of the two norms and of
    the two column-parallel linears, 4h, split over tp only with sequence parallel), and split over tp
    always: q, k, v before and after the rotation, attention output, gate, up and their product; plus a
    float32 log-sum-exp per head; with more ranks than key-value heads also all q, k, v, gathered. An MLP in slices
    keeps nothing but its norm's input.
    """
    width_split = tp if sequence_parallel else 1
    kept_input = shape.hidden * element // width_split
    if recompute is Recompute.full:
        return kept_input
    if recompute is Recompute.keep_attention:
        return kept_input + shape.heads * (shape.head_dim * element + 4) // tp
    query, key = shape.heads * shape.head_dim, max(shape.kv_heads, tp) * shape.head_dim
    split = 3 * query + 4 * key + (0 if sliced_mlp else 3 * shape.ffn)
    width = (3 if sliced_mlp else 4) * shape.hidden
    gathered = query + 2 * shape.kv_heads * shape.head_dim if tp > shape.kv_heads else 0
    return (width // width_split + gathered) * element + (split * element + 4 * shape.heads) // tp


def mlp_slices(rows: int, *, chunks: int, recompute: bool) -> int:
    """Slices in which an MLP takes `rows` rows under model.mlp_chunks=chunks.

    Slices are computed again in the backward, so 0 means one slice for a model that recomputes nothing.
    """
    return chunks or (-(-rows // MLP_ROWS) if recompute else 1)


def live_bytes_per_token(shape: ModelShape, *, element: int, tp: int, sequence_parallel: bool) -> int:
    """Activations and gradients alive inside one layer's backward, per token of the pack, on one rank.

    Without the MLP's inner ones (mlp_bytes_per_row). In elements: 11 width-sized (6h: residual stream, norms and their
    gradients; 5h: q, attention output, their gradients, rotation) and 6 of each of k and v's width. All but the 6h are
    split over tp; those only with sequence parallel, which instead gathers a whole input and its gradient (2h) around
    each column-parallel linear. With more ranks than key-value heads all q, k, v and their gradient are gathered too.
    """
    query, key = shape.heads * shape.head_dim, max(shape.kv_heads, tp) * shape.head_dim
    width = 6 * shape.hidden // (tp if sequence_parallel else 1) + (2 * shape.hidden if sequence_parallel else 0)
    if tp > shape.kv_heads:
        width += 2 * (query + 2 * shape.kv_heads * shape.head_dim)
    return element * (width + (5 * query + 6 * key) // tp)


def gathered_bytes_per_token(shape: ModelShape, *, element: int, tp: int, a2a: int, train: bool) -> int:
    """What each rank of a context-parallel ring holds of every token of a pack in one layer: keys are gathered.

    Key and value, of the heads that the rank computes, and in a backward the float32 sums of their gradients and
    what the last call adds to them, or those sums in the keys' dtype: 4 + 8 + 4 bytes an element of bfloat16. The
    all-reduce behind that is of less: 4 + 8. A forward has what it received beside what it is put together to.
    """
    width = max(1, shape.kv_heads // tp) // a2a * shape.head_dim
    return width * (4 * element + (8 if train else 0))


def score_bytes(shape: ModelShape, *, tp: int, a2a: int, pairs: int) -> int:
    """What a call of the plain kernel on so many pairs of a query and a key holds of the rank's heads, at most.

    Three float32 matrices of scores at a time, forward and backward (PlainKernel).
    """
    return 3 * 4 * (shape.heads // tp // a2a) * pairs


def mlp_bytes_per_row(shape: ModelShape, *, element: int, tp: int) -> int:
    """What an MLP in its backward holds of a row on one rank: gate, up, product, and their gradients."""
    return element * 6 * shape.ffn // tp


def logits_bytes(shape: ModelShape, *, tp: int, rows: int, train: bool) -> int:
    """Log-probability op on one rank: three float32 copies of a chunk of logits; in training, the head's gradient."""
    vocab = -(-shape.vocab // tp)
    chunk = min(rows, max(1, CHUNK_LOGITS // vocab))
    return 3 * 4 * chunk * vocab + (4 * vocab * shape.hidden if train else 0)
