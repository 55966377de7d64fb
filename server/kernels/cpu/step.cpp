// The C interface (step.h) over the engine for each pair of types.
#include "step.h"

#include <memory>

#include "engine.h"
#include "sampling.h"

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#endif

namespace boomerang {

struct Handle {
    virtual ~Handle() = default;
    virtual void step(const BsStep& step) = 0;
    virtual void head(const float* rows, int M, int end, float* logits) = 0;
    virtual void greedy(const float* rows, int M, int end, int32_t* tokens) = 0;
    virtual void draw(const float* logits, int M, const BsDraw* draws, int32_t* tokens) = 0;
    virtual void times(double* seconds) = 0;
};

template <class T, class W>
struct TypedHandle final : Handle {
    Engine<T, W> engine;
    std::vector<SamplingScratch> sampling;

    TypedHandle(const BsSpec& spec, const BsLayer* layers, const BsDifference* differences, int num_layers, const BsEnd* ends, int num_threads)
        : engine(spec, layers, differences, num_layers, ends, num_threads), sampling(num_threads) {}
    void step(const BsStep& step) override { engine.step(step); }
    void head(const float* rows, int M, int end, float* logits) override { engine.head(rows, M, end, logits); }
    void greedy(const float* rows, int M, int end, int32_t* tokens) override { engine.greedy(rows, M, end, tokens); }
    void times(double* seconds) override { engine.times(seconds); }
    void draw(const float* logits, int M, const BsDraw* draws, int32_t* tokens) override {
        const int vocab = engine.spec().vocab;
        engine.pool().begin();
        engine.pool().run(M, [&](int m, int thread) { tokens[m] = draw_token(logits + long(m) * vocab, vocab, draws[m], sampling[thread]); });
        engine.pool().end();
    }
};

inline Handle* handle(void* engine) { return static_cast<Handle*>(engine); }

}  // namespace boomerang

using namespace boomerang;

int32_t bs_prepare() {
#ifdef __AMX_BF16__
    // Linux gives a process the tile registers only when it asks for them.
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData)) return errno;
#endif
    return 0;
}

int64_t bs_packed_bytes(int32_t N, int32_t K, int32_t gated, int32_t type) {
    switch (type) {
        case BS_FLOAT: return packed_bytes<float>(N, K, gated);
        case BS_BF16: return packed_bytes<bf16>(N, K, gated);
        case BS_BF12: return packed_bytes<bf12>(N, K, gated);
        default: return num_panels(N, gated) * coded_panel_bytes(type, K);
    }
}

int64_t bs_packed_channels(int32_t N, int32_t gated) { return int64_t(num_panels(N, gated)) * kPanel; }

void bs_measure(const BsPack* matrices, int32_t count, int32_t num_threads) { measure_all(matrices, count, num_threads); }

void bs_pack(const BsPack* matrices, int32_t count, int32_t num_threads) { pack_all(matrices, count, num_threads); }

int64_t bs_page_bytes(const BsSpec* s, int32_t of_values) {
    const Int8Pages int8(s->page_size, s->head_dim, s->num_kv_heads);
    if (s->kv_type == BS_INT8) return s->num_kv_heads * (of_values ? int8.value_bytes() : int8.key_bytes());
    if (s->type == BS_FLOAT) return PageShape<float>(s->page_size, s->head_dim, s->num_kv_heads).page_elements() * 4;
    return PageShape<bf16>(s->page_size, s->head_dim, s->num_kv_heads).page_elements() * 2;
}

void* bs_create(const BsSpec* spec, const BsLayer* layers, const BsDifference* differences, int32_t num_layers, const BsEnd* ends, int32_t num_threads) {
    auto make = [&](auto* none) -> Handle* { return new std::remove_pointer_t<decltype(none)>(*spec, layers, differences, num_layers, ends, num_threads); };
    if (spec->type != BS_BF16) {
        if (spec->weight_type == BS_CODES) return make(static_cast<TypedHandle<float, Codes>*>(nullptr));
        return make(static_cast<TypedHandle<float, float>*>(nullptr));
    }
    if (spec->weight_type == BS_BF16) return make(static_cast<TypedHandle<bf16, bf16>*>(nullptr));
    if (spec->weight_type == BS_BF12) return make(static_cast<TypedHandle<bf16, bf12>*>(nullptr));
    return make(static_cast<TypedHandle<bf16, Codes>*>(nullptr));
}

void bs_destroy(void* engine) { delete handle(engine); }
void bs_step(void* engine, const BsStep* step) { handle(engine)->step(*step); }
void bs_head(void* engine, const float* rows, int32_t M, int32_t end, float* logits) { handle(engine)->head(rows, M, end, logits); }
void bs_greedy(void* engine, const float* rows, int32_t M, int32_t end, int32_t* tokens) { handle(engine)->greedy(rows, M, end, tokens); }
void bs_draw(void* engine, const float* logits, int32_t M, const BsDraw* draws, int32_t* tokens) { handle(engine)->draw(logits, M, draws, tokens); }
void bs_times(void* engine, double* seconds) { handle(engine)->times(seconds); }
