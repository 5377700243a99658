// Router logits, as Hugging Face's output_router_logits returns them: a tuple of [batch · sequence, experts], one a layer,
// stacked. The selection follows from them by the model's own rule: softmax or sigmoid, then the k largest.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/input_limits.h"
#include "import/steps.h"

namespace moectl {
namespace {

class RouterLogitsReader : public StepReader {
 public:
  RouterLogitsReader(Bytes& file, const ImportOptions& options, ImportNotes& notes)
      : file_(file),
        array_(file, file.name()),
        top_k_(needed_top_k(file, options)),
        pairs_(options.pairs),
        apart_(options.by_micro_batch),
        sigmoid_(options.scores == "sigmoid"),
        sequence_length_(options.sequence_length) {
    const auto& shape = array_.shape();
    const std::size_t n = shape.size();
    if (!array_.is_float() || n < 2 || n > 4 || shape[n - 1] < 2 || shape[n - 1] > kMostExperts ||
        shape[n - 2] > kMostTokensOfDump || shape[n - 2] < 1 || (n > 3 && shape[0] < 1) ||
        (n > 2 && (shape[n - 3] > kMostLayers || shape[n - 3] < 1))) {
      throw OtherFormat(file.name() + ": expected router logits [layers, tokens, experts] as floats: found " +
                        array_.description());
    }
    experts_ = shape[n - 1];
    tokens_ = shape[n - 2];
    layers_ = n > 2 ? shape[n - 3] : 1;
    steps_ = n > 3 ? shape[0] : 1;
    check_cells(layers_ * experts_, file.name());
    if (top_k_ > experts_)
      throw ImportError("--top-k: " + std::to_string(top_k_) + ": must be at most the experts of " +
                        file.name() + " (" + std::to_string(experts_) + ")");
    if (n > 3)
      notes.say(file.name() + ": four extents are read as [steps, layers, tokens, experts], " +
                std::to_string(steps_) + " steps of " + std::to_string(layers_) + " layers; " + kReshape);
    if (!options.mask.empty()) read_mask(options.mask);
    if (sequence_length_ > 0 && tokens_ % sequence_length_ != 0)
      throw ImportError("--sequence-length: " + std::to_string(sequence_length_) +
                        ": must divide the tokens of " + file.name() + " (" + std::to_string(tokens_) + ")");
  }

  bool next(ImportedStep& step) override {
    if (step_ == steps_) return false;
    step.step = step_++;
    step.layers.clear();
    held_ = 0;
    // Logits of one forward pass are one micro-batch.
    const std::string tag = apart_ ? "mb0" : "";
    for (std::int64_t l = 0; l < layers_; ++l) read_layer(l, step.layers[{static_cast<int>(l), tag}]);
    return true;
  }

 private:
  static constexpr const char* kReshape =
      "reshape [layers, batch, sequence, experts] to [layers, batch * sequence, experts]";

  /// [batch, sequence] or [tokens]: whole numbers or booleans, 0 = padding.
  void read_mask(const std::string& path) {
    Bytes file(path);
    NpyReader mask(file, path);
    const auto& shape = mask.shape();
    if (mask.is_float() || shape.empty() || shape.size() > 2 ||
        std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>()) != tokens_) {
      throw ImportError("--mask: " + path + ": expected [batch, sequence] of booleans or whole numbers, " +
                        std::to_string(tokens_) + " in all: found " + mask.description() +
                        (array_.shape().size() > 3 ? std::string("; ") + kReshape : ""));
    }
    // Piece by piece: the shape may promise more than the file holds.
    std::vector<std::int64_t> row;
    for (std::int64_t left = tokens_; left > 0; left -= static_cast<std::int64_t>(row.size())) {
      row.resize(static_cast<std::size_t>(std::min<std::int64_t>(left, 1 << 16)));
      mask.read(row);
      for (const std::int64_t real : row) {
        if (real != 0 && real != 1)
          throw ImportError("--mask: " + path + ": " + std::to_string(real) + ": must be 0 (padding) or 1");
      }
      mask_.insert(mask_.end(), row.begin(), row.end());
    }
    if (shape.size() == 2 && sequence_length_ == 0) sequence_length_ = shape[1];
  }

  void read_layer(std::int64_t l, ImportedLayer& layer) {
    const auto n = static_cast<std::size_t>(experts_);
    const auto k = static_cast<std::size_t>(top_k_);
    layer.top_k = top_k_;
    layer.every_expert = true;
    layer.tokens = 0;
    layer.counts.resize(n);
    layer.prob_sum.resize(n);
    layer.sqrt_prob_sum.resize(n);
    layer.has_probabilities = true;
    if (k < n) layer.gap_sum = 0;
    std::vector<double> logits(n), row(n);  // row: the scores
    std::vector<std::int64_t> of_sequence(n);
    std::vector<std::size_t> order(n);
    std::vector<std::int64_t> chosen;
    std::int64_t in_sequence = 0;
    const auto close = [&] {
      if (in_sequence > 0) layer.add_sequence(of_sequence, in_sequence);
      std::ranges::fill(of_sequence, 0);
      in_sequence = 0;
    };
    for (std::int64_t t = 0; t < tokens_; ++t) {
      if (sequence_length_ > 0 && t % sequence_length_ == 0) close();
      array_.read(logits);
      if (!mask_.empty() && mask_[static_cast<std::size_t>(t)] == 0) continue;
      // -inf takes an expert out of the choice; k of them must be left.
      std::size_t finite = 0;
      for (const double z : logits) {
        if (std::isnan(z) || z == HUGE_VAL)
          throw ImportError(file_.name() + ": layer " + std::to_string(l) + ", token " + std::to_string(t) +
                            ": " + (std::isnan(z) ? "NaN" : "+inf") + " among the logits");
        finite += std::isfinite(z);
      }
      if (finite < k)
        throw ImportError(file_.name() + ": layer " + std::to_string(l) + ", token " + std::to_string(t) +
                          ": " + std::to_string(finite) +
                          " logits above -inf: expected at least k = " + std::to_string(k));
      scores(logits, row);
      std::iota(order.begin(), order.end(), std::size_t{0});
      // By the logits, which order the experts as the scores do: small scores become 0, that of -inf and others alike.
      // Of equal ones the first expert, as torch.topk mostly takes them.
      std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(std::min(k + 1, n)),
                        order.end(), [&](std::size_t a, std::size_t b) {
                          return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
                        });
      if (layer.gap_sum) *layer.gap_sum += std::max(0.0, row[order[k - 1]] - row[order[k]]);
      if (sigmoid_) normalise(logits, row);
      double entropy = 0;
      for (std::size_t i = 0; i < n; ++i) {
        const double p = row[i];
        layer.prob_sum[i] += p;
        layer.sqrt_prob_sum[i] += std::sqrt(p);
        if (p > 0) entropy -= p * std::log(p);
      }
      layer.token_entropy_sum += std::max(0.0, entropy);
      if (pairs_) {
        chosen.assign(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(k));
        layer.pairs.add(chosen, held_, file_.name());
      }
      for (std::size_t j = 0; j < k; ++j) ++(sequence_length_ > 0 ? of_sequence : layer.counts)[order[j]];
      if (sequence_length_ > 0) {
        ++in_sequence;
      } else {
        ++*layer.tokens;
      }
    }
    close();
  }

  void scores(const std::vector<double>& logits, std::vector<double>& out) const {
    if (!sigmoid_) return softmax(logits, out);
    std::ranges::transform(logits, out.begin(), [](double z) { return 1 / (1 + std::exp(-z)); });
  }

  static void softmax(const std::vector<double>& logits, std::vector<double>& out) {
    const double largest = *std::ranges::max_element(logits);
    std::ranges::transform(logits, out.begin(), [&](double z) { return std::exp(z - largest); });
    const double sum = std::accumulate(out.begin(), out.end(), 0.0);
    for (double& p : out) p /= sum;
  }

  /// Sigmoids by their sum. Far below 0 a sigmoid is the exponential of its logit: where all are too small for a number, the
  /// softmax has their ratios.
  static void normalise(const std::vector<double>& logits, std::vector<double>& sigmoids) {
    const double sum = std::accumulate(sigmoids.begin(), sigmoids.end(), 0.0);
    if (!(sum > 0)) return softmax(logits, sigmoids);
    for (double& p : sigmoids) p /= sum;
  }

  Bytes& file_;
  NpyReader array_;
  int top_k_;
  bool pairs_, apart_;
  bool sigmoid_;
  std::int64_t sequence_length_;
  std::int64_t experts_ = 0, tokens_ = 0, layers_ = 0, steps_ = 0, step_ = 0;
  std::int64_t held_ = 0;  // pairs of this step
  std::vector<std::uint8_t> mask_;
};

}  // namespace

std::unique_ptr<StepReader> open_router_logits(Bytes& file, const ImportOptions& options,
                                               ImportNotes& notes) {
  return std::make_unique<RouterLogitsReader>(file, options, notes);
}

}  // namespace moectl
