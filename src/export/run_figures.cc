#include "export/run_figures.h"

#include <algorithm>

namespace moectl {

Metrics RecordMetrics::of(const LogRecord& record) {
  Metrics metrics;
  if (record.tag != "train" || record.layer < 0) return metrics;
  if (!record.metrics.empty()) {
    for (const auto& [name, value] : record.metrics) {
      if (const MetricField* field = find_metric(name)) metrics.*field->value = value;
    }
  } else if (record.stats.experts() > 0) {
    const MetricsOptions options{.details = details_, .targets = targets_of(record)};
    metrics = measurer_.measure(record.stats, options);
    auto& monitor = monitors_[record.layer];
    if (!monitor) monitor = std::make_unique<LayerMonitor>(record.stats.shape(), MonitorOptions(), options);
    monitor->observe(record.stats, metrics);
  }
  if (!details_ || record.stats.experts() == 0) return metrics;
  if (!metrics.load_p50) {
    const Metrics more =
        measurer_.measure(record.stats, MetricsOptions{.details = true, .targets = targets_of(record)});
    // What older logs do not hold. What is absent for another reason stays so.
    for (const MetricField& field : metric_fields()) {
      const bool newer =
          field.name.starts_with("load_p") || field.name == "minority_share" || field.name == "sequence_cv";
      if (newer && !(metrics.*field.value)) metrics.*field.value = more.*field.value;
    }
    if (!metrics.balancedness && metrics.straggler_slowdown)
      metrics.balancedness = 1 / *metrics.straggler_slowdown;
  }
  const std::optional<double> churn = churn_.of(record);
  if (!metrics.churn) metrics.churn = churn;
  return metrics;
}

std::optional<double> Churn::of(const LogRecord& record) {
  const auto it = record.actuators.find(std::string(name_of(Actuator::kExpertBias)));
  const auto experts = static_cast<std::size_t>(record.stats.experts());
  if (it == record.actuators.end() || it->second.applied.size() != experts) return std::nullopt;
  const std::vector<double>& biases = it->second.applied;
  Before& before = before_[{record.layer, record.tag}];
  // Only the step after the last one: what lies between others is not known.
  const bool known = before.biases.size() == experts && before.step + 1 == record.step;
  change_.resize(experts);
  for (std::size_t i = 0; i < experts && known; ++i) change_[i] = biases[i] - before.biases[i];
  before.biases = biases;
  before.step = record.step;
  return known ? estimate_churn(record.stats, change_, scratch_) : std::nullopt;
}

std::vector<double> targets_of(const LogRecord& record) {
  if (!record.targets) return {};
  return {record.targets->shares().begin(), record.targets->shares().end()};
}

void SummedCounts::add(const LogRecord& record) {
  if (record.layer < 0 || record.stats.experts() == 0 || record.stats.assignments() == 0) return;
  Layer& layer = layers_[record.layer];
  const auto counts = record.stats.counts();
  if (layer.sum.size() != counts.size())
    layer = {std::vector<std::int64_t>(counts.size()), std::int64_t{0}, {}, 0, {}};
  layer.targets = record.targets;
  // No count is above the total.
  if (__builtin_add_overflow(layer.total, record.stats.assignments(), &layer.total)) {
    throw LogError("layer " + std::to_string(record.layer) + ": step " + std::to_string(record.step) +
                   ": counts of the steps up to this one: must be at most 2^63 - 1 in sum");
  }
  for (std::size_t i = 0; i < counts.size(); ++i) layer.sum[i] += counts[i];
  if (window_ == 0) return;
  if (layer.ring.size() < window_) {
    layer.ring.emplace_back(counts.begin(), counts.end());
    return;
  }
  std::vector<std::int64_t>& oldest = layer.ring[layer.oldest];
  for (std::size_t i = 0; i < counts.size(); ++i) {
    layer.sum[i] -= oldest[i];
    layer.total -= oldest[i];
  }
  std::copy(counts.begin(), counts.end(), oldest.begin());
  layer.oldest = (layer.oldest + 1) % window_;
}

std::optional<double> SummedCounts::max_vio() const {
  double mean = 0;
  std::vector<double> loads;
  for (const auto& [number, layer] : layers_) {
    relative_loads(layer.sum, layer.targets.get(), loads);
    mean += (*std::max_element(loads.begin(), loads.end()) - 1) / static_cast<double>(layers_.size());
  }
  return layers_.empty() ? std::nullopt : std::optional(mean);
}

void RunFigures::add(const LogRecord& record, const Metrics& metrics) {
  if (record.tag == "validation" && record.loss) validation_[record.step] = *record.loss;
  if (record.tag != "train") return;
  steps_.try_emplace(record.step, record.step).first->second.add(sample_of(record, metrics));
  // A shift at the first step divides nothing.
  if (!shift_ || record.step < *shift_ || steps_.begin()->first >= *shift_) summed_.add(record);
}

Figures RunFigures::figures() const {
  std::vector<StepFigures> row;
  row.reserve(steps_.size());
  for (const auto& [number, step] : steps_) row.push_back(step.figures());
  Figures figures = compute_figures(row, shift_);
  figures.max_vio_global = summed_.max_vio();
  if (!validation_.empty()) figures.validation_loss = validation_.rbegin()->second;
  return figures;
}

Figures read_figures(const std::string& path, std::optional<std::int64_t> shift) {
  LogReader reader(path);
  WholeRecords records(reader);
  return read_figures(records, shift ? shift : reader.header().shift);
}

Figures read_figures(WholeRecords& records, std::optional<std::int64_t> shift, std::size_t summed) {
  RecordMetrics metrics;
  RunFigures run(shift, summed);
  while (const auto record = records.next()) run.add(*record, metrics.of(*record));
  return run.figures();
}

}  // namespace moectl
