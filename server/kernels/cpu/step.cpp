// The C interface (step.h) over the engine for each pair of types.
#include "step.h"

#include <cstdio>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>

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
    virtual void stop() = 0;  // after an exception: the team rests
    virtual void step(const BsStep& step) = 0;
    virtual void head(const float* rows, const uint8_t* widths, int M, int end, float* logits) = 0;
    virtual void greedy(const float* rows, const uint8_t* widths, int M, int end, int32_t* tokens) = 0;
    virtual void draw(const float* logits, int M, const BsDraw* draws, int32_t* tokens) = 0;
    virtual void times(double* seconds) = 0;
};

template <class T, class W>
struct TypedHandle final : Handle {
    Engine<T, W> engine;
    std::vector<SamplingScratch> sampling;

    TypedHandle(const BsSpec& spec, const BsLayer* layers, const BsDifference* differences, int num_layers, const BsEnd* ends, int num_threads)
        : engine(spec, layers, differences, num_layers, ends, num_threads), sampling(num_threads) {}
    void stop() override { engine.pool().end(); }
    void step(const BsStep& step) override { engine.step(step); }
    void head(const float* rows, const uint8_t* widths, int M, int end, float* logits) override { engine.head(rows, widths, M, end, logits); }
    void greedy(const float* rows, const uint8_t* widths, int M, int end, int32_t* tokens) override { engine.greedy(rows, widths, M, end, tokens); }
    void times(double* seconds) override { engine.times(seconds); }
    void draw(const float* logits, int M, const BsDraw* draws, int32_t* tokens) override {
        const int vocab = engine.spec().vocab;
        engine.pool().begin();
        engine.pool().run(M, [&](int m, int thread) { tokens[m] = draw_token(logits + long(m) * vocab, vocab, draws[m], sampling[thread]); });
        engine.pool().end();
    }
};

inline Handle* handle(void* engine) { return static_cast<Handle*>(engine); }

thread_local char last_error[256] = "";

template <class Call>
BsStatus guarded(Handle* handle, Call&& call) noexcept {
    BsStatus status = BS_OK;
    try {
        call();
    } catch (const std::bad_alloc&) {
        std::snprintf(last_error, sizeof last_error, "the system gives no more memory");
        status = BS_NO_MEMORY;
    } catch (const std::length_error&) {  // of a vector that would be longer than memory
        std::snprintf(last_error, sizeof last_error, "more memory is asked for than there can be");
        status = BS_NO_MEMORY;
    } catch (const std::exception& error) {
        std::snprintf(last_error, sizeof last_error, "%s", error.what());
        status = BS_FAILED;
    } catch (...) {
        std::snprintf(last_error, sizeof last_error, "unknown exception");
        status = BS_FAILED;
    }
    if (status != BS_OK && handle) handle->stop();
    return status;
}

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

const char* bs_error() { return last_error; }

BsStatus bs_measure(const BsPack* matrices, int32_t count, int32_t num_threads) {
    return guarded(nullptr, [&] { measure_all(matrices, count, num_threads); });
}

BsStatus bs_pack(const BsPack* matrices, int32_t count, int32_t num_threads) {
    return guarded(nullptr, [&] { pack_all(matrices, count, num_threads); });
}

int64_t bs_page_bytes(const BsSpec* s, int32_t of_values) {
    const Int8Pages int8(s->page_size, s->head_dim, s->num_kv_heads);
    if (s->kv_type == BS_INT8) return s->num_kv_heads * (of_values ? int8.value_bytes() : int8.key_bytes());
    if (s->type == BS_FLOAT) return PageShape<float>(s->page_size, s->head_dim, s->num_kv_heads).page_elements() * 4;
    return PageShape<bf16>(s->page_size, s->head_dim, s->num_kv_heads).page_elements() * 2;
}

BsStatus bs_create(void** engine, const BsSpec* spec, const BsLayer* layers, const BsDifference* differences, int32_t num_layers, const BsEnd* ends, int32_t num_threads) {
    return guarded(nullptr, [&] {
        auto make = [&](auto* none) {
            *engine = static_cast<Handle*>(new std::remove_pointer_t<decltype(none)>(*spec, layers, differences, num_layers, ends, num_threads));
        };
        if (spec->type != BS_BF16) {
            if (spec->weight_type == BS_CODES) return make(static_cast<TypedHandle<float, Codes>*>(nullptr));
            return make(static_cast<TypedHandle<float, float>*>(nullptr));
        }
        if (spec->weight_type == BS_BF16) return make(static_cast<TypedHandle<bf16, bf16>*>(nullptr));
        if (spec->weight_type == BS_BF12) return make(static_cast<TypedHandle<bf16, bf12>*>(nullptr));
        make(static_cast<TypedHandle<bf16, Codes>*>(nullptr));
    });
}

void bs_destroy(void* engine) { delete handle(engine); }
BsStatus bs_step(void* engine, const BsStep* step) {
    return guarded(handle(engine), [&] { handle(engine)->step(*step); });
}
BsStatus bs_head(void* engine, const float* rows, const uint8_t* widths, int32_t M, int32_t end, float* logits) {
    return guarded(handle(engine), [&] { handle(engine)->head(rows, widths, M, end, logits); });
}
BsStatus bs_greedy(void* engine, const float* rows, const uint8_t* widths, int32_t M, int32_t end, int32_t* tokens) {
    return guarded(handle(engine), [&] { handle(engine)->greedy(rows, widths, M, end, tokens); });
}
BsStatus bs_draw(void* engine, const float* logits, int32_t M, const BsDraw* draws, int32_t* tokens) {
    return guarded(handle(engine), [&] { handle(engine)->draw(logits, M, draws, tokens); });
}
void bs_times(void* engine, double* seconds) { handle(engine)->times(seconds); }
