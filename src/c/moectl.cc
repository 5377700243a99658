// moectl.h on Controller. A call checks its arguments, says what it wants of the controller, and turns exceptions into
// codes and words.
#include "moectl.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "moectl/controller.h"
#include "moectl/figures.h"
#include "moectl/run_log.h"
#include "moectl/state.h"
#include "moectl/version.h"

struct moectl_controller {
  moectl::Controller controller;
  std::unique_ptr<moectl::RunLogWriter> log;
};

namespace {

thread_local std::string last_error;
thread_local std::string said_by_callback;

void keep(std::string& words, const char* message) noexcept {
  try {
    words = message;
  } catch (...) {
    words.clear();
  }
}

int fail(int code, const char* message) noexcept {
  keep(last_error, message);
  return code;
}

/// Runs `body`; what it throws becomes a code.
template <class Body>
int guarded(Body body) noexcept {
  try {
    body();
    return MOECTL_OK;
  } catch (const moectl::ConfigError& e) {
    return fail(MOECTL_CONFIG, e.what());
  } catch (const moectl::StateError& e) {
    return fail(MOECTL_STATE, e.what());
  } catch (const moectl::ReductionError& e) {
    return fail(MOECTL_REDUCTION, e.what());
  } catch (const std::invalid_argument& e) {
    return fail(MOECTL_INVALID, e.what());
  } catch (const std::exception& e) {
    return fail(MOECTL_FAILED, e.what());
  } catch (...) {
    return fail(MOECTL_FAILED, "an exception of an unknown kind");
  }
}

void require(bool good, const std::string& what) {
  if (!good) throw std::invalid_argument(what);
}

template <class Handle>
Handle& deref(Handle* c) {
  if (!c) throw std::invalid_argument("controller: NULL: must be one that moectl_new() made");
  return *c;
}

void require_given(const void* argument, const char* name) {
  require(argument != nullptr, std::string(name) + ": must not be NULL");
}

/// guarded() for a call on a controller. The handle is looked at before anything else, so that no argument is read, and no
/// callback replaced, on behalf of a controller that is not there.
template <class Handle, class Body>
int with(Handle* c, Body body) noexcept {
  // cppcheck-suppress throwInNoexceptFunction  // guarded() catches what deref() throws
  return guarded([&] { body(deref(c)); });
}

/// The caller's struct in this library's form: what the caller does not know is zero.
template <class Struct>
Struct sized(const Struct* given, const char* name) {
  Struct own{};
  require_given(given, name);
  require(given->size >= sizeof given->size,
          std::string(name) + ".size: " + std::to_string(given->size) + ": must be the sizeof of the struct");
  std::memcpy(&own, given, std::min(given->size, sizeof own));
  return own;
}

/// Runs a callback; throws what it said with moectl_set_error(), else its code.
template <class Call>
void run_callback(const char* which, Call call) {
  said_by_callback.clear();
  if (const int code = call()) {
    throw std::runtime_error(said_by_callback.empty()
                                 ? std::string(which) + " callback returned " + std::to_string(code)
                                 : said_by_callback);
  }
}

/// A copy in memory of C, with a zero behind it.
char* copied(std::string_view text) {
  auto* copy = static_cast<char*>(std::malloc(text.size() + 1));
  if (!copy) throw std::bad_alloc();
  std::memcpy(copy, text.data(), text.size());
  copy[text.size()] = '\0';
  return copy;
}

template <class T>
std::span<const T> array(const T* values, std::size_t size) {
  return values ? std::span(values, size) : std::span<const T>();
}

std::size_t experts_of(const moectl_controller& c, int layer) {
  return static_cast<std::size_t>(c.controller.shape(layer).experts);
}

std::size_t top_k_of(const moectl_controller& c, int layer) {
  return static_cast<std::size_t>(c.controller.shape(layer).top_k);
}

/// Calls `visit` with every layer that is meant, its place among them, and the place of its first expert in the arrays.
template <class Visit>
void for_layers(const moectl_controller& c, int layer, Visit visit) {
  if (layer != MOECTL_ALL_LAYERS) return visit(layer, std::size_t{0}, std::size_t{0});
  std::size_t number = 0, at = 0;
  for (const int id : c.controller.layers()) {
    visit(id, number++, at);
    at += experts_of(c, id);
  }
}

void require_size(const moectl_controller& c, int layer, std::size_t size, const char* name) {
  std::size_t wanted = 0;
  for_layers(c, layer, [&](int id, std::size_t, std::size_t) { wanted += experts_of(c, id); });
  require(size == wanted,
          std::string(name) + ": " + std::to_string(size) + " values: must be " + std::to_string(wanted));
}

/// Copies what `biases_of` returns for each layer that is meant.
template <class BiasesOf>
int copied_biases(const moectl_controller* c, int layer, double* bias, std::size_t size, BiasesOf biases_of) {
  return with(c, [&](const moectl_controller& handle) {
    require_size(handle, layer, size, "bias");
    require_given(bias, "bias");
    for_layers(handle, layer,
               [&](int id, std::size_t, std::size_t at) { std::ranges::copy(biases_of(id), bias + at); });
  });
}

/// What became of the parts of a state, as JSON.
std::string json_of(const std::vector<moectl::KeptPart>& parts) {
  auto list = nlohmann::ordered_json::array();
  for (const moectl::KeptPart& part : parts) {
    auto& one = list.emplace_back(
        nlohmann::ordered_json{{"layer", part.layer}, {"key", part.key}, {"fate", name_of(part.fate)}});
    if (part.layer < 0) one["layer"] = nullptr;
    if (!part.why.empty()) one["why"] = part.why;
  }
  return list.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

moectl::Keep keep_of(int keep) {
  require(keep == MOECTL_EVERYTHING || keep == MOECTL_WHAT_FITS,
          "keep: " + std::to_string(keep) + ": must be MOECTL_EVERYTHING or MOECTL_WHAT_FITS");
  return keep == MOECTL_WHAT_FITS ? moectl::Keep::what_fits : moectl::Keep::everything;
}

int give_state(const moectl_controller* c, char** state, size_t* size, const auto& save) {
  return with(c, [&](const moectl_controller& handle) {
    require_given(state, "state");
    require_given(size, "size");
    const std::string bytes = save(handle.controller);
    *state = copied(bytes);
    *size = bytes.size();
  });
}

int take_state(moectl_controller* c, const char* state, char** kept, int keep, const auto& load) {
  return with(c, [&](moectl_controller& handle) {
    require_given(state, "state");
    const std::string parts = json_of(load(handle.controller, keep_of(keep)));
    if (kept) *kept = copied(parts);
  });
}

int make(moectl_controller** made, const char* source,
         moectl::ControllerConfig (*read)(const char*, const char*), const char* name) {
  return guarded([&] {
    require_given(made, "made");
    *made = nullptr;
    require_given(source, name ? "config" : "path");
    *made = new moectl_controller{moectl::Controller(read(source, name)), nullptr};
  });
}

void log_with(moectl_controller& c, std::unique_ptr<moectl::RunLogWriter> writer) {
  c.log = std::move(writer);
  if (!c.log) return c.controller.set_log(nullptr);
  c.controller.set_log([log = c.log.get()](const moectl::StepReport& report) { log->write(report); });
}

}  // namespace

const char* moectl_version() {
  return moectl::kVersion;
}

const char* moectl_error() {
  return last_error.c_str();
}

void moectl_set_error(const char* message) {
  keep(said_by_callback, message ? message : "");
}

void moectl_free_text(char* text) {
  std::free(text);
}

int moectl_new(const char* config, const char* name, moectl_controller** made) {
  return make(
      made, config, [](const char* text, const char* file) { return moectl::parse_config(text, file); },
      name ? name : "config");
}

int moectl_new_from_file(const char* path, moectl_controller** made) {
  return make(
      made, path, [](const char* file, const char*) { return moectl::load_config(file); }, nullptr);
}

void moectl_free(moectl_controller* c) {
  delete c;
}

int moectl_layers(const moectl_controller* c, int* ids, size_t size, size_t* layers) {
  return with(c, [&](const moectl_controller& handle) {
    const std::size_t all = handle.controller.layers().size();
    if (layers) *layers = all;
    if (!ids) return;
    require(size == all, "ids: " + std::to_string(size) + " values: must be " + std::to_string(all));
    std::ranges::copy(handle.controller.layers(), ids);
  });
}

int moectl_shape(const moectl_controller* c, int layer, size_t* experts, size_t* top_k) {
  return with(c, [&](const moectl_controller& handle) {
    const moectl::StatsShape& shape = handle.controller.shape(layer);
    if (experts) *experts = static_cast<std::size_t>(shape.experts);
    if (top_k) *top_k = static_cast<std::size_t>(shape.top_k);
  });
}

int moectl_config(const moectl_controller* c, char** text) {
  return with(c, [&](const moectl_controller& handle) {
    require_given(text, "text");
    *text = copied(moectl::to_json(handle.controller.config()));
  });
}

int moectl_record(moectl_controller* c, int layer, const moectl_batch* batch, int64_t micro_batch) {
  return with(c, [&](moectl_controller& handle) {
    const moectl_batch b = sized(batch, "batch");
    const std::size_t k = top_k_of(handle, layer), n = experts_of(handle, layer);
    require(!b.experts || !b.experts32,
            "batch.experts, batch.experts32: both are given: must be one of them");
    require(b.experts || b.experts32 || b.tokens == 0,
            "batch.experts: must not be NULL with " + std::to_string(b.tokens) + " tokens");
    thread_local std::vector<std::int64_t> widened;
    if (b.experts32) widened.assign(b.experts32, b.experts32 + b.tokens * k);
    handle.controller.record(
        layer,
        {.experts = b.experts32 ? std::span<const std::int64_t>(widened) : array(b.experts, b.tokens * k),
         .mask = array(b.mask, b.tokens),
         .sequence_length = b.sequence_length,
         .sequence_ids = array(b.sequence_ids, b.tokens),
         .top_values = array(b.top_values, b.tokens * (k + 1)),
         .biased_scores = array(b.biased_scores, b.tokens * n),
         .probabilities = array(b.probabilities, b.tokens * n),
         .domain_ids = array(b.domain_ids, b.tokens),
         .dropped = b.dropped ? std::optional(*b.dropped) : std::nullopt,
         .balance_loss = b.balance_loss ? std::optional(*b.balance_loss) : std::nullopt,
         .z_loss = b.z_loss ? std::optional(*b.z_loss) : std::nullopt},
        micro_batch);
  });
}

int moectl_record_counts(moectl_controller* c, int layer, const int64_t* counts, size_t size,
                         const int64_t* tokens) {
  return with(c, [&](moectl_controller& handle) {
    require_size(handle, layer, size, "counts");
    require_given(counts, "counts");
    for_layers(handle, layer, [&](int id, std::size_t number, std::size_t at) {
      const std::span own(counts + at, experts_of(handle, id));
      handle.controller.record_with(id, [&](moectl::RoutingStats& stats) {
        if (tokens) {
          stats.add_counts(own, tokens[number]);
          return;
        }
        // Counts that cannot be are left to the library to reject, by their own name.
        constexpr std::uint64_t kMost = std::numeric_limits<std::int64_t>::max();
        std::uint64_t sum = 0;
        for (const std::int64_t count : own) {
          sum = std::min(kMost, sum + static_cast<std::uint64_t>(std::max<std::int64_t>(count, 0)));
        }
        const std::uint64_t k = top_k_of(handle, id);
        stats.add_counts(own, static_cast<std::int64_t>(sum / k + (sum % k > 0)));
      });
    });
  });
}

int moectl_record_value(moectl_controller* c, int layer, const char* name, double value) {
  return with(c, [&](moectl_controller& handle) {
    require_given(name, "name");
    handle.controller.record_with(layer, [&](moectl::RoutingStats& stats) { stats.add_value(name, value); });
  });
}

int moectl_check_choices(moectl_controller* c, int layer, size_t tokens, const int64_t* experts,
                         const float* biased_scores, const float* scores) {
  return with(c, [&](moectl_controller& handle) {
    const std::size_t n = experts_of(handle, layer);
    if (tokens > 0) {
      require_given(experts, "experts");
      require_given(biased_scores, "biased_scores");
    }
    handle.controller.check_choices(layer, {.experts = array(experts, tokens * top_k_of(handle, layer)),
                                            .biased_scores = array(biased_scores, tokens * n),
                                            .scores = array(scores, tokens * n)});
  });
}

int moectl_say(moectl_controller* c, const char* kind, int layer, const char* text) {
  return with(c, [&](moectl_controller& handle) {
    require_given(kind, "kind");
    require_given(text, "text");
    const auto known = moectl::notice_kind_of(kind);
    if (!known) {
      std::string kinds;
      for (int i = 0; i < moectl::kNoticeKindCount; ++i)
        (kinds += i > 0 ? ", " : "") += name_of(static_cast<moectl::NoticeKind>(i));
      throw std::invalid_argument(std::string("kind: ") + kind + ": must be one of " + kinds);
    }
    handle.controller.say(*known, layer, text);
  });
}

int moectl_step(moectl_controller* c, const moectl_step_info* info) {
  return with(c, [&](moectl_controller& handle) {
    moectl_step_info given{};
    if (info) given = sized(info, "info");
    const std::size_t domains = handle.controller.config().model.domains.size();
    handle.controller.step(
        {.loss = given.loss ? std::optional(*given.loss) : std::nullopt,
         .gradient_norm = given.gradient_norm ? std::optional(*given.gradient_norm) : std::nullopt,
         .skipped = given.skipped != 0,
         .next_mixture = array(given.next_mixture, domains)});
  });
}

int moectl_steps(const moectl_controller* c, int64_t* steps) {
  return with(c, [&](const moectl_controller& handle) {
    require_given(steps, "steps");
    *steps = handle.controller.steps();
  });
}

int moectl_figures_of(const moectl_controller* c, moectl_figures* figures) {
  return with(c, [&](const moectl_controller& handle) {
    moectl_figures own = sized(figures, "figures");
    const std::size_t size = std::min(own.size, sizeof own);
    const moectl::StepReport& report = handle.controller.report();
    const moectl::StepFigures f = moectl::figures_of(report);
    const auto number = [](const std::optional<double>& x) {
      return x.value_or(std::numeric_limits<double>::quiet_NaN());
    };
    own.step = f.step;
    own.tokens = f.tokens;
    own.max_vio = number(f.max_vio);
    own.floor_max_vio = number(f.floor_max_vio);
    own.cv = number(f.cv);
    own.floor_cv = number(f.floor_cv);
    own.drop_rate = number(f.drop_rate);
    own.dead_experts = f.dead_experts;
    own.limit_hits = f.limit_hits;
    own.notices = std::count_if(report.notices.begin(), report.notices.end(),
                                [&](const moectl::Notice& notice) { return notice.step == report.step; });
    std::memcpy(figures, &own, size);
  });
}

int moectl_report_json(const moectl_controller* c, int arrays, char** text) {
  return with(c, [&](const moectl_controller& handle) {
    require_given(text, "text");
    moectl::ControllerConfig config = handle.controller.config();
    config.log.per_expert = arrays != 0;
    config.timeline.clear();  // whose changes are the log's to say
    std::string lines;
    moectl::RunLogWriter writer([&](std::string_view more) { lines = more; }, config);
    lines.clear();  // of the header
    writer.write(handle.controller.report());
    std::replace(lines.begin(), lines.end(), '\n', ',');
    if (!lines.empty()) lines.pop_back();
    *text = copied('[' + lines + ']');
  });
}

int moectl_biases(const moectl_controller* c, int layer, double* bias, size_t size) {
  return copied_biases(c, layer, bias, size, [&](int id) { return c->controller.bias(id); });
}

int moectl_deployment_biases(const moectl_controller* c, int layer, double* bias, size_t size) {
  return copied_biases(c, layer, bias, size, [&](int id) { return c->controller.deployment_bias(id); });
}

int moectl_aux_loss_weight(const moectl_controller* c, int layer, double* weight) {
  return with(c, [&](const moectl_controller& handle) {
    require_given(weight, "weight");
    *weight = handle.controller.aux_loss_weight(layer);
  });
}

int moectl_temperature(const moectl_controller* c, int layer, double* temperature) {
  return with(c, [&](const moectl_controller& handle) {
    require_given(temperature, "temperature");
    *temperature = handle.controller.temperature(layer);
  });
}

int moectl_begin_at(moectl_controller* c, int64_t step) {
  return with(c, [&](moectl_controller& handle) { handle.controller.begin_at(step); });
}

int moectl_hold(moectl_controller* c, int on) {
  return with(c, [&](moectl_controller& handle) { handle.controller.hold(on != 0); });
}

int moectl_freeze(moectl_controller* c, int layer, int on) {
  return with(c, [&](moectl_controller& handle) { handle.controller.freeze(layer, on != 0); });
}

int moectl_plans(const moectl_controller* c, unsigned char* plans, size_t size) {
  return with(c, [&](const moectl_controller& handle) {
    const std::span<const int> layers = handle.controller.layers();
    require_given(plans, "plans");
    require(size == layers.size(),
            "plans: " + std::to_string(size) + " values: must be " + std::to_string(layers.size()));
    for (const int layer : layers) {
      const moectl::LayerPlan plan = handle.controller.plan(layer);
      *plans++ =
          static_cast<unsigned char>((plan.frozen ? MOECTL_FROZEN : 0) | (plan.decided ? MOECTL_DECIDED : 0) |
                                     (plan.ever_moves ? MOECTL_EVER_MOVES : 0));
    }
  });
}

int moectl_set_reduction(moectl_controller* c, int (*sum)(void*, int64_t*, size_t), void* user) {
  return with(c, [&](moectl_controller& handle) {
    if (!sum) return handle.controller.set_reduction(nullptr);
    handle.controller.set_reduction([sum, user](std::span<std::int64_t> values) {
      run_callback("reduction", [&] { return sum(user, values.data(), values.size()); });
    });
  });
}

int moectl_set_log(moectl_controller* c, int (*log)(void*, const char*, size_t), void* user) {
  return with(c, [&](moectl_controller& handle) {
    if (!log) return log_with(handle, nullptr);
    const auto write = [log, user](std::string_view text) {
      run_callback("log", [&] { return log(user, text.data(), text.size()); });
    };
    log_with(handle, std::make_unique<moectl::RunLogWriter>(write, handle.controller.config()));
  });
}

int moectl_log_to_file(moectl_controller* c, const char* path, int append) {
  return with(c, [&](moectl_controller& handle) {
    require_given(path, "path");
    log_with(handle, std::make_unique<moectl::RunLogWriter>(std::string(path), handle.controller.config(),
                                                            append != 0));
  });
}

int moectl_adopt(moectl_controller* c, int layer, const double* bias, size_t size) {
  return with(c, [&](moectl_controller& handle) {
    require_size(handle, layer, size, "bias");
    require_given(bias, "bias");
    for_layers(handle, layer, [&](int id, std::size_t, std::size_t at) {
      handle.controller.adopt(id, {bias + at, experts_of(handle, id)});
    });
  });
}

int moectl_adopt_aux_loss_weight(moectl_controller* c, int layer, double weight) {
  return with(c, [&](moectl_controller& handle) { handle.controller.adopt_aux_loss_weight(layer, weight); });
}

int moectl_adopt_temperature(moectl_controller* c, int layer, double temperature) {
  return with(c, [&](moectl_controller& handle) { handle.controller.adopt_temperature(layer, temperature); });
}

int moectl_save(const moectl_controller* c, char** state, size_t* size) {
  return give_state(c, state, size, [&](const moectl::Controller& controller) { return controller.save(); });
}

int moectl_load(moectl_controller* c, const char* state, size_t size, int keep, char** kept) {
  return take_state(c, state, kept, keep, [&](moectl::Controller& controller, moectl::Keep what) {
    return controller.load({state, size}, what);
  });
}

int moectl_save_layer(const moectl_controller* c, int layer, char** state, size_t* size) {
  return give_state(c, state, size,
                    [&](const moectl::Controller& controller) { return controller.save_layer(layer); });
}

int moectl_load_layer(moectl_controller* c, int layer, const char* state, size_t size, int keep,
                      char** kept) {
  return take_state(c, state, kept, keep, [&](moectl::Controller& controller, moectl::Keep what) {
    return controller.load_layer(layer, {state, size}, what);
  });
}
