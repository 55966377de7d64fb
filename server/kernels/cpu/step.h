// The plain C interface between Python and the kernels. Pointers come from tensors that Python keeps alive.
//
// T is the pair's type (float32 or bfloat16): norms, biases, KV. W is the type of packed weights: T, compressed bfloat16
// (compressed.h), or codes (codes.h), where each matrix has a type of its own.
#pragma once
#include <cstdint>

extern "C" {

// What the functions that do work return: an exception of C++ never leaves them. `bs_error` has the words of the last one
// that this thread saw. An engine goes on working after a failed call; what the call was to write is not defined.
enum BsStatus : int32_t { BS_OK = 0, BS_NO_MEMORY = 1, BS_FAILED = 2 };

enum BsType : int32_t {
    BS_FLOAT = 0, BS_BF16 = 1, BS_INT8 = 2, BS_BF12 = 3,
    // As GGUF names them; BS_WIDE: codes of eight bits with float scale and minimum per 16 inputs, which hold them all.
    BS_Q4_0 = 4, BS_Q4_1 = 5, BS_Q5_0 = 6, BS_Q5_1 = 7, BS_Q8_0 = 8, BS_Q4_K = 9, BS_Q5_K = 10, BS_Q6_K = 11, BS_WIDE = 12,
    BS_CODES = 13,  // as the type of an engine's weights: each matrix says its own
    // Nested codes (codes_nested.h), read at so many bits; one layout.
    BS_NESTED_4 = 14, BS_NESTED_5 = 15, BS_NESTED_6 = 16, BS_NESTED_8 = 17,
};

// A weight whose exponent has no code: input, channel within its panel, and what it is.
struct BsRest {
    int32_t input;
    uint16_t channel, bits;
};

// Packed weights (see bs_pack). `scale` for int8 only: one float per channel of the panels. The others for BS_BF12 only:
// `exponents` [panels, 64] in the order of a line, `rest` in the order of panels and inputs, that of panel p from
// rest_start[p] to rest_start[p + 1].
struct BsWeights {
    const void* data;
    const float* scale;
    const uint8_t* exponents;
    const int32_t* rest_start;
    const BsRest* rest;
    int32_t type;
    int32_t rows;           // of this part, where `more` follows: the rows below, of another type
    const BsWeights* more;
    const void* nested;     // the whole matrix in nested codes, for rows that have a width of 4, 5, 6 or 8; or null
};

constexpr int32_t BS_EXACT = 16;  // the width of rows that read a matrix as it was loaded

// Null where a family has none. Everything but the BsWeights and the angles is T.
struct BsLayer {
    const void *attn_norm_w, *attn_norm_b, *qkv_b, *q_norm_w, *k_norm_w, *o_b, *mlp_norm_w, *mlp_norm_b, *up_b, *down_b;
    const void *post_attn_norm_w, *post_mlp_norm_w;  // of what attention and the MLP give
    const float *cos, *sin;  // [positions, rotary_dim / 2]; null: nothing is turned
    int64_t window;          // how many tokens a token sees, itself among them; 0: all
    BsWeights qkv, o, up, down;
};

// What a student layer adds to the products of the teacher layer that it is a difference to: output channels
// [start, stop) get b (a x). `a` [sum of ranks, K] holds the terms' factors one below the other, `b` is [stop - start,
// rank]; ranks are multiples of 32 (padded with zeros). Both are of the factors' type. In BsDifference the norms of a
// student layer that has none of its own are null, and it has no terms.
struct BsTerm {
    BsWeights b;
    int32_t start, stop, rank;
};
struct BsFactors {
    BsWeights a;
    int32_t num_terms;
    BsTerm terms[3];
};
struct BsDifference {
    const void *attn_norm_w, *mlp_norm_w;
    BsFactors qkv, o, up, down;
};

// Embedding, final norm and head of one side. An embedding that is also somebody's head is packed, any other one is
// `embed`, T [vocab, hidden].
struct BsEnd {
    const void *embed, *positions, *norm_w, *norm_b, *head_b;
    BsWeights packed_embed, head;
};

struct BsSpec {
    int32_t hidden, intermediate, num_heads, num_kv_heads, head_dim, vocab;
    int32_t layer_norm, activation, gated, parallel_residual, rotary_dim, page_size, type, weight_type, factor_type, exact_activations, kv_type, wide_qk_norm, rows_alone;  // exact_activations: codes times floats, slowly, to compare with; kv_type: BS_INT8 (attention_int8.h), else `type`; wide_qk_norm: over all heads together; rows_alone: few rows get the sums that each has alone, on tiles too
    // stream_eps: of norms of the hidden state; norm_offset: added to the weights of all norms; input_scale: of the embedding.
    float eps, stream_eps, scale, norm_offset, input_scale;
};

// One step: `program` lists (layer, first request, end request, split, student layer): requests from `split` on run as
// the student layer, a difference to `layer` with KV of its own. Tokens [0, embed_cut) take the embedding of end 0, the
// others that of end 1; of the wanted rows [0, norm_cut) take the norm of end 0.
struct BsStep {
    int32_t num_tokens, num_requests, num_segments, num_rows, embed_cut, norm_cut;
    int32_t doorbell, reserved;   // an eventfd to ring as soon as the step computes, or -1
    const int32_t* program;       // [num_segments, 5]
    const int32_t* input_ids;     // [T]
    const uint8_t* widths;        // [T], bits that each token's products read of matrices that have nested codes; null: BS_EXACT
    const int32_t* positions;     // [T]
    const int32_t* query_start;   // [R + 1]
    const int32_t* slots;         // [R]
    const int32_t* block_tables;  // [layers, slots, blocks]
    int64_t layer_stride, slot_stride;
    int32_t num_saves, num_restores;
    const int32_t* saves;         // [num_saves, 3] by segment: before segment i, token t's hidden state goes to row r of `states`
    const int32_t* restores;      // [num_restores, 2]: token t begins with row r; it is in no segment before
    float* states;                // [rows, hidden]
    const int32_t* rows;          // [num_rows], tokens whose final-normed hidden state is wanted
    void *k_pages, *v_pages;
    float* out;                   // [num_rows, hidden]
};

// One matrix to pack: `source` [N, K] to `target`, of `type` (BS_BF12: from bfloat16; codes: from a file's blocks); for int8
// also its scales [N], to one per channel; for BS_WIDE int8 codes with scales and minima [N, K / 16]; for nested codes float16 scales [4, N, K / 32] of 8, 6, 5 and 4
// bits, and bytes of zero [N, K / 32] as minima. For BS_BF12 bs_measure fills `exponents` and `rest_start` [panels + 1], whose last says how long `rest` is.
struct BsPack {
    const void* source;
    void* target;
    const float* source_scale;
    const float* source_minimum;
    float* scale;
    uint8_t* exponents;
    int32_t* rest_start;
    BsRest* rest;
    int32_t N, K, gated, type;
};

// How one row is drawn, given a number of [0, 1); temperature 0 takes the likeliest, top_k 0 and top_p 1 keep all.
struct BsDraw {
    double uniform;
    float temperature, top_p, min_p;
    int32_t top_k;
};

// 0, or the errno with which the system refused the instructions that this build needs.
int32_t bs_prepare();
const char* bs_error();
// Bytes of a packed matrix, and its number of scales (channels with padding).
int64_t bs_packed_bytes(int32_t N, int32_t K, int32_t gated, int32_t type);
int64_t bs_packed_channels(int32_t N, int32_t gated);
BsStatus bs_measure(const struct BsPack* matrices, int32_t count, int32_t num_threads);
BsStatus bs_pack(const struct BsPack* matrices, int32_t count, int32_t num_threads);
// Bytes of K of one page, or of V.
int64_t bs_page_bytes(const struct BsSpec* spec, int32_t of_values);

// An engine to `*engine`; `layers` and `differences` by global id.
BsStatus bs_create(void** engine, const struct BsSpec* spec, const struct BsLayer* layers, const struct BsDifference* differences, int32_t num_layers, const struct BsEnd* ends, int32_t num_threads);
void bs_destroy(void* engine);
BsStatus bs_step(void* engine, const struct BsStep* step);
// logits [M, vocab] float = rows [M, hidden] float times the head of `end`, read at `widths` [M] or null.
BsStatus bs_head(void* engine, const float* rows, const uint8_t* widths, int32_t M, int32_t end, float* logits);
// The likeliest token of each row (the first of equals), without logits in memory; -1 if that logit is not finite.
BsStatus bs_greedy(void* engine, const float* rows, const uint8_t* widths, int32_t M, int32_t end, int32_t* tokens);
// tokens[m] drawn from logits [M, vocab].
BsStatus bs_draw(void* engine, const float* logits, int32_t M, const struct BsDraw* draws, int32_t* tokens);
// Seconds since the last call: products, attention, placing of K and V, norms, head, embedding.
void bs_times(void* engine, double* seconds);
}
