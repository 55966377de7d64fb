// The plain C interface between Python and the kernels. Pointers come from tensors that Python keeps alive.
#pragma once
#include <cstdint>

extern "C" {

// All tensors of W unless said otherwise; null where a family has none.
struct BsLayer {
    const void *attn_norm_w, *attn_norm_b, *qkv_w, *qkv_b, *q_norm_w, *k_norm_w, *o_w, *o_b;
    const void *mlp_norm_w, *mlp_norm_b, *up_w, *up_b, *down_w, *down_b;
};

struct BsSpec {
    int32_t hidden, intermediate, num_heads, num_kv_heads, head_dim, vocab;
    int32_t layer_norm, activation, gated, parallel_residual, rotary_dim, page_size, is_bf16;
    float eps, scale;
    const float *cos, *sin;  // [positions, rotary_dim / 2]
};

// One step: `program` lists (layer, first request, end request); the rows of `hidden` [T, hidden] float are updated.
struct BsStep {
    int32_t num_tokens, num_requests, num_segments;
    const int32_t* program;       // [num_segments, 3]
    const int32_t* positions;     // [T]
    const int32_t* query_start;   // [R + 1]
    const int32_t* slots;         // [R]
    const int32_t* block_tables;  // [layers, slots, blocks]
    int64_t layer_stride, slot_stride;
    void *k_pages, *v_pages;
    float* hidden;
};

void* bs_create(const BsSpec* spec, const BsLayer* layers, int32_t num_layers, int32_t num_threads);
void bs_destroy(void* engine);
void bs_step(void* engine, const BsStep* step);
// Final norm of rows [M, hidden] float in place.
void bs_norm(void* engine, float* rows, int32_t M, const void* weight, const void* bias);
// logits [M, vocab] float = rows [M, hidden] float times head [vocab, hidden].
void bs_head(void* engine, const float* rows, int32_t M, const void* head, const void* bias, float* logits);

// How one row is drawn, given a number of [0, 1); temperature 0 takes the likeliest, top_k 0 and top_p 1 keep all.
struct BsDraw {
    double uniform;
    float temperature, top_p, min_p;
    int32_t top_k;
};

// tokens[m] drawn from logits [M, vocab].
void bs_draw(void* engine, const float* logits, int32_t M, const struct BsDraw* draws, int32_t* tokens);
}
