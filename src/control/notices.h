// Notices: the notices of a step, in memory that is made once.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string_view>
#include <vector>

#include "base/format.h"
#include "moectl/notice.h"

namespace moectl {

class Notices {
 public:
  /// Room for several notices a layer.
  explicit Notices(std::size_t layers);

  /// Adds a notice whose text is `parts` joined. Does not allocate. Without room left, the last notice says so.
  void add(NoticeKind kind, int layer, std::int64_t step, std::initializer_list<std::string_view> parts);
  std::span<const Notice> all() const { return {notices_.data(), count_}; }
  void clear() { count_ = 0; }

 private:
  std::vector<Notice> notices_;
  std::vector<char> texts_;
  std::size_t count_ = 0;
};

}  // namespace moectl
