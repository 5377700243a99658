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

int fail(int code, const char* message) noexcept {
  try {
    last_error = message;
  } catch (...) {
    last_error.clear();
  }
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
  if (!c) throw std::invalid_argument("controller: is NULL");
  return *c;
}

/// The caller's struct in this library's form: what the caller does not know is zero.
template <class Struct>
Struct sized(const Struct* given, const char* name) {
  Struct own{};
  require(given != nullptr, std::string(name) + ": is NULL");
  require(given->size >= sizeof given->size, std::string(name) + ": size is not set");
  std::memcpy(&own, given, std::min(given->size, sizeof own));
  return own;
}

/// An exception with what a callback said, in its own words where moectl_set_error() gave them.
std::runtime_error callback_failed(const char* which, int code) {
  return std::runtime_error(
      last_error.empty() ? std::string(which) + " callback returned " + std::to_string(code) : last_error);
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
  return guarded([&] {
    require_size(deref(c), layer, size, "bias");
    require(bias != nullptr, "bias: is NULL");
    for_layers(*c, layer,
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

int give_state(char** state, size_t* size, const auto& save) {
  return guarded([&] {
    require(state && size, "state, size: must not be NULL");
    const std::string bytes = save();
    *state = copied(bytes);
    *size = bytes.size();
  });
}

int take_state(const char* state, char** kept, int keep, const auto& load) {
  return guarded([&] {
    require(state != nullptr, "state: is NULL");
    const std::string parts = json_of(load(keep_of(keep)));
    if (kept) *kept = copied(parts);
  });
}

int make(moectl_controller** made, const char* source,
         moectl::ControllerConfig (*read)(const char*, const char*), const char* name) {
  return guarded([&] {
    require(made != nullptr, "made: is NULL");
    *made = nullptr;
    require(source != nullptr, "config: is NULL");
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
  fail(0, message ? message : "");
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
  return guarded([&] {
    const std::size_t all = deref(c).controller.layers().size();
    if (layers) *layers = all;
    if (!ids) return;
    require(size == all, "ids: " + std::to_string(size) + " values: must be " + std::to_string(all));
    std::ranges::copy(c->controller.layers(), ids);
  });
}

int moectl_shape(const moectl_controller* c, int layer, size_t* experts, size_t* top_k) {
  return guarded([&] {
    const moectl::StatsShape& shape = deref(c).controller.shape(layer);
    if (experts) *experts = static_cast<std::size_t>(shape.experts);
    if (top_k) *top_k = static_cast<std::size_t>(shape.top_k);
  });
}

int moectl_config(const moectl_controller* c, char** text) {
  return guarded([&] {
    require(text != nullptr, "text: is NULL");
    *text = copied(moectl::to_json(deref(c).controller.config()));
  });
}

int moectl_record(moectl_controller* c, int layer, const moectl_batch* batch, int64_t micro_batch) {
  return guarded([&] {
    const moectl_batch b = sized(batch, "batch");
    const std::size_t k = top_k_of(deref(c), layer), n = experts_of(*c, layer);
    require((b.experts != nullptr) + (b.experts32 != nullptr) <= 1,
            "batch: experts and experts32 exclude each other");
    require(b.experts || b.experts32 || b.tokens == 0, "batch.experts: is NULL");
    thread_local std::vector<std::int64_t> widened;
    if (b.experts32) widened.assign(b.experts32, b.experts32 + b.tokens * k);
    c->controller.record(
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
  return guarded([&] {
    require_size(deref(c), layer, size, "counts");
    require(counts != nullptr, "counts: is NULL");
    for_layers(*c, layer, [&](int id, std::size_t number, std::size_t at) {
      const std::span own(counts + at, experts_of(*c, id));
      c->controller.record(id, [&](moectl::RoutingStats& stats) {
        if (tokens) {
          stats.add_counts(own, tokens[number]);
          return;
        }
        // Unsigned, so that counts that cannot be are left to the library to reject.
        std::uint64_t sum = 0;
        for (const std::int64_t count : own) sum += static_cast<std::uint64_t>(count);
        const std::uint64_t k = top_k_of(*c, id);
        stats.add_counts(own, static_cast<std::int64_t>(sum / k + (sum % k > 0)));
      });
    });
  });
}

int moectl_record_value(moectl_controller* c, int layer, const char* name, double value) {
  return guarded([&] {
    require(name != nullptr, "name: is NULL");
    deref(c).controller.record(layer, [&](moectl::RoutingStats& stats) { stats.add_value(name, value); });
  });
}

int moectl_check_choices(moectl_controller* c, int layer, size_t tokens, const int64_t* experts,
                         const float* biased_scores, const float* scores) {
  return guarded([&] {
    const std::size_t n = experts_of(deref(c), layer);
    require((experts && biased_scores) || tokens == 0, "experts, biased_scores: must not be NULL");
    c->controller.check_choices(layer, {.experts = array(experts, tokens * top_k_of(*c, layer)),
                                        .biased_scores = array(biased_scores, tokens * n),
                                        .scores = array(scores, tokens * n)});
  });
}

int moectl_say(moectl_controller* c, const char* kind, int layer, const char* text) {
  return guarded([&] {
    require(kind && text, "kind, text: must not be NULL");
    const auto known = moectl::notice_kind_of(kind);
    require(known.has_value(), std::string("kind: ") + kind + ": must be a kind of notice");
    deref(c).controller.say(*known, layer, text);
  });
}

int moectl_step(moectl_controller* c, const moectl_step_info* info) {
  return guarded([&] {
    moectl_step_info given{};
    if (info) given = sized(info, "info");
    const std::size_t domains = deref(c).controller.config().model.domains.size();
    c->controller.step(
        {.loss = given.loss ? std::optional(*given.loss) : std::nullopt,
         .gradient_norm = given.gradient_norm ? std::optional(*given.gradient_norm) : std::nullopt,
         .skipped = given.skipped != 0,
         .next_mixture = array(given.next_mixture, domains)});
  });
}

int moectl_steps(const moectl_controller* c, int64_t* steps) {
  return guarded([&] {
    require(steps != nullptr, "steps: is NULL");
    *steps = deref(c).controller.steps();
  });
}

int moectl_figures_of(const moectl_controller* c, moectl_figures* figures) {
  return guarded([&] {
    moectl_figures own = sized(figures, "figures");
    const std::size_t size = std::min(own.size, sizeof own);
    const moectl::StepReport& report = deref(c).controller.report();
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
  return guarded([&] {
    require(text != nullptr, "text: is NULL");
    moectl::ControllerConfig config = deref(c).controller.config();
    config.log.per_expert = arrays != 0;
    config.timeline.clear();  // whose changes are the log's to say
    std::string lines;
    moectl::RunLogWriter writer([&](std::string_view more) { lines = more; }, config);
    lines.clear();  // of the header
    writer.write(c->controller.report());
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
  return guarded([&] {
    require(weight != nullptr, "weight: is NULL");
    *weight = deref(c).controller.aux_loss_weight(layer);
  });
}

int moectl_temperature(const moectl_controller* c, int layer, double* temperature) {
  return guarded([&] {
    require(temperature != nullptr, "temperature: is NULL");
    *temperature = deref(c).controller.temperature(layer);
  });
}

int moectl_begin_at(moectl_controller* c, int64_t step) {
  return guarded([&] { deref(c).controller.begin_at(step); });
}

int moectl_hold(moectl_controller* c, int on) {
  return guarded([&] { deref(c).controller.hold(on != 0); });
}

int moectl_freeze(moectl_controller* c, int layer, int on) {
  return guarded([&] { deref(c).controller.freeze(layer, on != 0); });
}

int moectl_set_reduction(moectl_controller* c, int (*sum)(void*, int64_t*, size_t), void* user) {
  return guarded([&] {
    if (!sum) return deref(c).controller.set_reduction(nullptr);
    deref(c).controller.set_reduction([sum, user](std::span<std::int64_t> values) {
      last_error.clear();
      if (const int code = sum(user, values.data(), values.size())) throw callback_failed("reduction", code);
    });
  });
}

int moectl_set_log(moectl_controller* c, int (*log)(void*, const char*, size_t), void* user) {
  return guarded([&] {
    if (!log) return log_with(deref(c), nullptr);
    const auto write = [log, user](std::string_view text) {
      last_error.clear();
      if (const int code = log(user, text.data(), text.size())) throw callback_failed("log", code);
    };
    log_with(deref(c), std::make_unique<moectl::RunLogWriter>(write, c->controller.config()));
  });
}

int moectl_log_to_file(moectl_controller* c, const char* path, int append) {
  return guarded([&] {
    require(path != nullptr, "path: is NULL");
    log_with(deref(c),
             std::make_unique<moectl::RunLogWriter>(std::string(path), c->controller.config(), append != 0));
  });
}

int moectl_adopt(moectl_controller* c, int layer, const double* bias, size_t size) {
  return guarded([&] {
    require_size(deref(c), layer, size, "bias");
    require(bias != nullptr, "bias: is NULL");
    for_layers(*c, layer, [&](int id, std::size_t, std::size_t at) {
      c->controller.adopt(id, {bias + at, experts_of(*c, id)});
    });
  });
}

int moectl_adopt_aux_loss_weight(moectl_controller* c, int layer, double weight) {
  return guarded([&] { deref(c).controller.adopt_aux_loss_weight(layer, weight); });
}

int moectl_adopt_temperature(moectl_controller* c, int layer, double temperature) {
  return guarded([&] { deref(c).controller.adopt_temperature(layer, temperature); });
}

int moectl_save(const moectl_controller* c, char** state, size_t* size) {
  return give_state(state, size, [&] { return deref(c).controller.save(); });
}

int moectl_load(moectl_controller* c, const char* state, size_t size, int keep, char** kept) {
  return take_state(state, kept, keep, [&](moectl::Keep what) {
    return deref(c).controller.load({state, size}, what);
  });
}

int moectl_save_layer(const moectl_controller* c, int layer, char** state, size_t* size) {
  return give_state(state, size, [&] { return deref(c).controller.save_layer(layer); });
}

int moectl_load_layer(moectl_controller* c, int layer, const char* state, size_t size, int keep,
                      char** kept) {
  return take_state(state, kept, keep, [&](moectl::Keep what) {
    return deref(c).controller.load_layer(layer, {state, size}, what);
  });
}
