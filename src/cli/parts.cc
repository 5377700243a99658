#include "cli/parts.h"

#include <algorithm>
#include <iostream>
#include <map>
#include <utility>

#include "cli/reshape.h"
#include "cli/tool.h"

namespace moectl::cli {
namespace {

bool is_numbered(std::string_view text, std::string_view word) {
  return text.size() > word.size() && text.starts_with(word) &&
         text.find_first_not_of("0123456789", word.size()) == std::string_view::npos;
}

/// Adds the sums that both have.
void add(LogRecord& to, const LogRecord& more) {
  if (to.stats.experts() != more.stats.experts() || to.stats.top_k() != more.stats.top_k())
    throw InputError("layer " + std::to_string(to.layer) +
                     ": experts and top_k must be the same in all parts of a step");
  const StatsNeeds &a = to.stats.shape().needs, &b = more.stats.shape().needs;
  StatsNeeds needs;
  needs.gap = a.gap && b.gap;
  needs.sequences = a.sequences && b.sequences;
  needs.probabilities = a.probabilities && b.probabilities;
  to.stats = reshaped(to.stats, {}, needs, {});
  to.stats += reshaped(more.stats, {}, needs, {});
  to.domains.clear();
}

}  // namespace

TagParts parts_of(std::string_view tag) {
  TagParts parts;
  const auto append = [](std::string& text, std::string_view segment) {
    text += (text.empty() ? "" : "/") + std::string(segment);
  };
  for (std::size_t from = 0; from <= tag.size();) {
    const std::size_t to = std::min(tag.find('/', from), tag.size());
    const std::string_view segment = tag.substr(from, to - from);
    if (is_numbered(segment, "mb")) {
      parts.micro_batch = true;
    } else {
      append(parts.of_rank, segment);
      if (is_numbered(segment, "rank")) {
        parts.rank = true;
      } else {
        append(parts.rest, segment);
      }
    }
    from = to + 1;
  }
  if (parts.rest.empty()) parts.rest = "train";
  if (parts.of_rank.empty()) parts.of_rank = "train";
  return parts;
}

std::optional<LogRecord> WholeRecords::next() {
  for (;;) {
    if (!ready_.empty()) {
      std::optional<LogRecord> record = std::move(ready_.front());
      ready_.pop_front();
      return record;
    }
    if (end_) return std::nullopt;
    std::optional<LogRecord> record = held_ ? std::exchange(held_, std::nullopt) : reader_.next();
    if (!record) {
      end_ = true;
      join();
      continue;
    }
    if (!parts_.empty() && record->step != parts_.front().step) {
      join();
      held_ = std::move(record);
      continue;
    }
    const TagParts parts = parts_of(record->tag);
    if (!parts.any()) whole_.insert(record->tag);
    if (!parts.any() || record->layer < 0 || record->stats.experts() == 0 || whole_.contains(parts.rest))
      return record;
    parts_.push_back(std::move(*record));
  }
}

void WholeRecords::join() {
  // By layer and tag, then by rank.
  std::map<std::pair<int, std::string>, std::map<std::string, LogRecord>> joined;
  for (LogRecord& part : parts_) {
    const TagParts parts = parts_of(part.tag);
    part.tag = keep_ranks_ ? parts.of_rank : parts.rest;
    const int layer = part.layer;
    auto& of_layer = joined[{layer, part.tag}];
    const auto it = of_layer.find(parts.of_rank);
    if (it == of_layer.end()) {
      of_layer.emplace(parts.of_rank, std::move(part));
    } else {
      add(it->second, part);
    }
  }
  parts_.clear();
  const bool copies = !joined.empty() && std::ranges::all_of(joined, [](const auto& entry) {
    const LogRecord& first = entry.second.begin()->second;
    return entry.second.size() > 1 && std::ranges::all_of(entry.second, [&](const auto& rank) {
             return std::ranges::equal(rank.second.stats.counts(), first.stats.counts());
           });
  });
  if (copies && !std::exchange(said_, true))
    std::cerr << "the ranks hold the same counts: taken once, as copies of the same tokens\n";
  for (auto& [key, ranks] : joined) {
    LogRecord whole = std::move(ranks.begin()->second);
    for (auto it = std::next(ranks.begin()); it != ranks.end() && !copies; ++it) add(whole, it->second);
    ready_.push_back(std::move(whole));
  }
}

}  // namespace moectl::cli
