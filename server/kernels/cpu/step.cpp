// Runs one step of the program on the CPU: norm, qkv, rotary embedding, KV write, paged attention, output, MLP.
//
// The hidden state stays float32 throughout; products take W (float, or bfloat16 with float32 sums).
#include "step.h"

#include <memory>
#include <vector>

#include "attention.h"
#include "pool.h"
#include "sampling.h"

namespace boomerang {

inline int chunks_for(int n, int size) { return (n + size - 1) / size; }

struct EngineBase {
    virtual ~EngineBase() = default;
    virtual void step(const BsStep& step) = 0;
    virtual void norm_rows(float* rows, int M, const void* weight, const void* bias) = 0;
    virtual void draw(const float* logits, int M, const BsDraw* draws, int32_t* tokens) = 0;
    virtual void head(const float* rows, int M, const void* head, const void* bias, float* logits) = 0;
};

template <class W>
class Engine final : public EngineBase {
  public:
    Engine(const BsSpec& spec, const BsLayer* layers, int num_layers, int num_threads)
        : s_(spec), layers_(layers, layers + num_layers), pool_(num_threads), scratch_(num_threads), sampling_(num_threads) {}

    void step(const BsStep& step) override {
        step_ = &step;
        const size_t T = step.num_tokens, E = s_.hidden;
        normed_.resize(T * E);
        qkv_.resize(T * qkv_width());
        q_.resize(T * q_width());
        attended_.resize(T * q_width());
        attended_w_.resize(T * q_width());
        act_.resize(T * s_.intermediate);
        pool_.begin();
        for (int i = 0; i < step.num_segments; i++) {
            const int32_t* segment = step.program + 3 * i;
            layer(segment[0], segment[1], segment[2]);
        }
        pool_.end();
    }

    void norm_rows(float* rows, int M, const void* weight, const void* bias) override {
        pool_.begin();
        pool_.run(chunks_for(M, 4), [&](int chunk, int) {
            for (int m = 4 * chunk; m < std::min(M, 4 * chunk + 4); m++)
                norm(rows + long(m) * s_.hidden, rows + long(m) * s_.hidden, static_cast<const W*>(weight), static_cast<const W*>(bias), s_.hidden);
        });
        pool_.end();
    }

    void head(const float* rows, int M, const void* head, const void* bias, float* logits) override {
        const int E = s_.hidden, V = s_.vocab;
        normed_.resize(size_t(M) * E);
        bias_.clear();
        const float* b = widen(bias, V, bias_);
        for (size_t i = 0; i < size_t(M) * E; i += 16)
            store16(normed_.data() + i, load16(rows + i, tail16(int(size_t(M) * E - i))), tail16(int(size_t(M) * E - i)));
        pool_.begin();
        const int n_chunk = 256;
        pool_.run(chunks_for(V, n_chunk), [&](int chunk, int) {
            int n = chunk * n_chunk, N = std::min(n_chunk, V - n);
            gemm<W>(normed_.data(), E, M, static_cast<const W*>(head) + long(n) * E, E, b ? b + n : nullptr, logits + n, V, N, E);
        });
        pool_.end();
    }

    void draw(const float* logits, int M, const BsDraw* draws, int32_t* tokens) override {
        pool_.begin();
        pool_.run(M, [&](int m, int thread) { tokens[m] = draw_token(logits + long(m) * s_.vocab, s_.vocab, draws[m], sampling_[thread]); });
        pool_.end();
    }

  private:
    int q_width() const { return s_.num_heads * s_.head_dim; }
    int kv_width() const { return s_.num_kv_heads * s_.head_dim; }
    int qkv_width() const { return q_width() + 2 * kv_width(); }

    // RMSNorm or LayerNorm of one row of n, statistics in float32.
    template <class Out>
    void norm(const float* x, Out* y, const W* weight, const W* bias, int n) const {
        __m512 sum = _mm512_setzero_ps(), squares = sum;
        if (s_.layer_norm)
            for (int i = 0; i < n; i += 16) sum = _mm512_add_ps(sum, load16(x + i, tail16(n - i)));
        const float mean = s_.layer_norm ? _mm512_reduce_add_ps(sum) / n : 0.0f;
        const __m512 m = _mm512_set1_ps(mean);
        for (int i = 0; i < n; i += 16) {
            __m512 d = _mm512_maskz_sub_ps(tail16(n - i), load16(x + i, tail16(n - i)), m);
            squares = _mm512_fmadd_ps(d, d, squares);
        }
        const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / n + s_.eps));
        for (int i = 0; i < n; i += 16) {
            __mmask16 mask = tail16(n - i);
            __m512 v = _mm512_mul_ps(_mm512_mul_ps(_mm512_sub_ps(load16(x + i, mask), m), factor), load16(weight + i, mask));
            if (bias) v = _mm512_add_ps(v, load16(bias + i, mask));
            store16(y + i, v, mask);
        }
    }

    void norm_tokens(int first, int last, const void* weight, const void* bias) {
        auto rows = [&](int from, int to) {
            for (int t = from; t < to; t++)
                norm(step_->hidden + long(t) * s_.hidden, normed_.data() + long(t) * s_.hidden, static_cast<const W*>(weight), static_cast<const W*>(bias), s_.hidden);
        };
        if (last - first <= 16) return rows(first, last);
        pool_.run(chunks_for(last - first, 16), [&](int c, int) { rows(first + 16 * c, std::min(last, first + 16 * c + 16)); });
    }

    // Chunk of output rows: small enough to balance, large enough that a tile's start-up does not show.
    int chunk_rows(int N, int M) const {
        int target = M <= 4 ? 96 : 64;
        return std::max(16, std::min(target, (chunks_for(N, 4 * pool_.num_threads()) + 15) / 16 * 16));
    }

    template <bool add>
    void product(const W* x, long ldx, int M, const void* w, const void* bias, float* y, long ldy, int N, int K) {
        const int size = chunk_rows(N, M);
        bias_.clear();
        const float* b = widen(bias, N, bias_);
        pool_.run(chunks_for(N, size), [&](int chunk, int) {
            int n = chunk * size;
            gemm<W, add>(x, ldx, M, static_cast<const W*>(w) + long(n) * K, K, b ? b + n : nullptr, y + n, ldy, std::min(size, N - n), K);
        });
    }

    void layer(int id, int r0, int r1) {
        const BsLayer& w = layers_[id];
        const int t0 = step_->query_start[r0], t1 = step_->query_start[r1], T = t1 - t0, E = s_.hidden;
        float* hidden = step_->hidden + long(t0) * E;
        W* normed = normed_.data() + long(t0) * E;
        norm_tokens(t0, t1, w.attn_norm_w, w.attn_norm_b);
        product<false>(normed, E, T, w.qkv_w, w.qkv_b, qkv_.data() + long(t0) * qkv_width(), qkv_width(), qkv_width(), E);
        place(id, w, r0, r1);
        attention(id, r0, r1);
        if (s_.parallel_residual) norm_tokens(t0, t1, w.mlp_norm_w, w.mlp_norm_b);
        product<true>(attended_w_.data() + long(t0) * q_width(), q_width(), T, w.o_w, w.o_b, hidden, E, E, q_width());
        if (!s_.parallel_residual) norm_tokens(t0, t1, w.mlp_norm_w, w.mlp_norm_b);
        mlp_up(w, normed, T, act_.data() + long(t0) * s_.intermediate);
        product<true>(act_.data() + long(t0) * s_.intermediate, s_.intermediate, T, w.down_w, w.down_b, hidden, E, E, s_.intermediate);
    }

    void mlp_up(const BsLayer& w, const W* x, int T, W* act) {
        const int I = s_.intermediate, E = s_.hidden, size = chunk_rows(I, T), block = 256;
        const W* up = static_cast<const W*>(w.up_w);
        bias_.clear();
        const float* bias = widen(w.up_b, s_.gated ? 2 * I : I, bias_);
        pool_.run(chunks_for(I, size), [&](int chunk, int thread) {
            const int n = chunk * size, N = std::min(size, I - n);
            auto& buffer = scratch_[thread].scores;
            buffer.resize(size_t(2) * block * size);
            float *gate = buffer.data(), *value = gate + long(block) * size;
            for (int m = 0; m < T; m += block) {
                const int M = std::min(block, T - m);
                gemm<W>(x + long(m) * E, E, M, up + long(n) * E, E, bias ? bias + n : nullptr, gate, size, N, E);
                if (s_.gated) gemm<W>(x + long(m) * E, E, M, up + long(I + n) * E, E, bias ? bias + I + n : nullptr, value, size, N, E);
                for (int i = 0; i < M; i++)
                    for (int j = 0; j < N; j += 16) {
                        __mmask16 mask = tail16(N - j);
                        __m512 a = activate16(load16(gate + long(i) * size + j, mask), s_.activation);
                        if (s_.gated) a = _mm512_mul_ps(a, load16(value + long(i) * size + j, mask));
                        store16(act + long(m + i) * I + n + j, a, mask);
                    }
            }
        });
    }

    // Head norms, rotary embedding, and K and V into their pages.
    void place(int id, const BsLayer& w, int r0, int r1) {
        auto request = [&](int r, int from, int to) {
            const int32_t* table = step_->block_tables + id * step_->layer_stride + step_->slots[r] * step_->slot_stride;
            for (int t = from; t < to; t++) place_token(w, t, table);
        };
        const int T = step_->query_start[r1] - step_->query_start[r0];
        if (T <= 4) {
            for (int r = r0; r < r1; r++) request(r, step_->query_start[r], step_->query_start[r + 1]);
            return;
        }
        items_.clear();
        for (int r = r0; r < r1; r++)
            for (int t = step_->query_start[r]; t < step_->query_start[r + 1]; t += 16)
                items_.push_back({r, 0, t, std::min(t + 16, step_->query_start[r + 1])});
        const int group = T == r1 - r0 ? 4 : 1;  // all one-token rows: several to a chunk
        pool_.run(chunks_for(int(items_.size()), group), [&](int chunk, int) {
            for (int i = chunk * group; i < std::min(int(items_.size()), (chunk + 1) * group); i++)
                request(items_[i].request, items_[i].from, items_[i].to);
        });
    }

    void place_token(const BsLayer& w, int t, const int32_t* table) {
        const int D = s_.head_dim, P = s_.page_size, position = step_->positions[t];
        float* row = qkv_.data() + long(t) * qkv_width();
        const long page = table[position / P] * long(s_.num_kv_heads) * P * D + long(position % P) * D;
        for (int h = 0; h < s_.num_heads; h++) {
            float* q = row + h * D;
            if (w.q_norm_w) norm(q, q, static_cast<const W*>(w.q_norm_w), static_cast<const W*>(nullptr), D);
            rotate(q, position);
            convert(q, q_.data() + long(t) * q_width() + h * D, D);
        }
        for (int h = 0; h < s_.num_kv_heads; h++) {
            float* k = row + q_width() + h * D;
            if (w.k_norm_w) norm(k, k, static_cast<const W*>(w.k_norm_w), static_cast<const W*>(nullptr), D);
            rotate(k, position);
            convert(k, static_cast<W*>(step_->k_pages) + page + long(h) * P * D, D);
            convert(k + kv_width(), static_cast<W*>(step_->v_pages) + page + long(h) * P * D, D);
        }
    }

    // Halves convention: channel i turns with channel i + rotary_dim / 2.
    void rotate(float* x, int position) const {
        const int half = s_.rotary_dim / 2;
        const float *cos = s_.cos + long(position) * half, *sin = s_.sin + long(position) * half;
        for (int i = 0; i < half; i += 16) {
            __mmask16 mask = tail16(half - i);
            __m512 c = load16(cos + i, mask), s = load16(sin + i, mask), a = load16(x + i, mask), b = load16(x + half + i, mask);
            store16(x + i, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)), mask);
            store16(x + half + i, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)), mask);
        }
    }

    static void convert(const float* from, W* to, int n) {
        for (int i = 0; i < n; i += 16) store16(to + i, load16(from + i, tail16(n - i)), tail16(n - i));
    }

    void attention(int id, int r0, int r1) {
        const int D = s_.head_dim, P = s_.page_size, G = s_.num_heads / s_.num_kv_heads;
        items_.clear();
        // Late query blocks see the most positions; starting with them keeps the last chunks short.
        for (int r = r0; r < r1; r++) {
            const int from = step_->query_start[r], to = step_->query_start[r + 1];
            for (int t = from + (to - from - 1) / kQueryTokens * kQueryTokens; t >= from; t -= kQueryTokens)
                for (int h = 0; h < s_.num_kv_heads; h++) items_.push_back({r, h, t, std::min(t + kQueryTokens, to)});
        }
        const long page_stride = long(s_.num_kv_heads) * P * D;
        pool_.run(int(items_.size()), [&](int chunk, int thread) {
            const Item& it = items_[chunk];
            AttentionItem<W> item;
            const long column = long(it.head) * G * D;
            item.q = q_.data() + long(it.from) * q_width() + column;
            item.q_stride = item.out_stride = q_width();
            item.out = attended_.data() + long(it.from) * q_width() + column;
            item.k_pages = static_cast<const W*>(step_->k_pages);
            item.v_pages = static_cast<const W*>(step_->v_pages);
            item.table = step_->block_tables + id * step_->layer_stride + step_->slots[it.request] * step_->slot_stride;
            item.page_stride = page_stride;
            item.head_offset = long(it.head) * P * D;
            item.group = G;
            item.head_dim = D;
            item.page_size = P;
            item.num_tokens = it.to - it.from;
            item.first_position = step_->positions[it.from];
            item.scale = s_.scale;
            attend<W>(item, scratch_[thread]);
            for (int t = it.from; t < it.to; t++)
                convert(attended_.data() + long(t) * q_width() + column, attended_w_.data() + long(t) * q_width() + column, G * D);
        });
    }

    const float* widen(const void* values, int n, std::vector<float>& buffer) const {
        if (!values) return nullptr;
        buffer.resize(n);
        for (int i = 0; i < n; i++) buffer[i] = to_float(static_cast<const W*>(values)[i]);
        return buffer.data();
    }

    struct Item {
        int request, head, from, to;
    };
    BsSpec s_;
    std::vector<BsLayer> layers_;
    Pool pool_;
    std::vector<AttentionScratch> scratch_;
    std::vector<SamplingScratch> sampling_;
    const BsStep* step_ = nullptr;
    std::vector<W> normed_, q_, attended_w_, act_;
    std::vector<float> qkv_, attended_, bias_;
    std::vector<Item> items_;
};

}  // namespace boomerang

using boomerang::EngineBase;

void* bs_create(const BsSpec* spec, const BsLayer* layers, int32_t num_layers, int32_t num_threads) {
    if (spec->is_bf16) return static_cast<EngineBase*>(new boomerang::Engine<boomerang::bf16>(*spec, layers, num_layers, num_threads));
    return static_cast<EngineBase*>(new boomerang::Engine<float>(*spec, layers, num_layers, num_threads));
}

void bs_destroy(void* engine) { delete static_cast<EngineBase*>(engine); }

void bs_step(void* engine, const BsStep* step) { static_cast<EngineBase*>(engine)->step(*step); }

void bs_norm(void* engine, float* rows, int32_t M, const void* weight, const void* bias) {
    static_cast<EngineBase*>(engine)->norm_rows(rows, M, weight, bias);
}

void bs_head(void* engine, const float* rows, int32_t M, const void* head, const void* bias, float* logits) {
    static_cast<EngineBase*>(engine)->head(rows, M, head, bias, logits);
}

void bs_draw(void* engine, const float* logits, int32_t M, const BsDraw* draws, int32_t* tokens) {
    static_cast<EngineBase*>(engine)->draw(logits, M, draws, tokens);
}
