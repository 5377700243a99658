// Notices: what a user should hear about once, in words that can be acted on. A reason says why one actuator did not
// move; a notice says what was found and where to look.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace moectl {

enum class NoticeKind : std::uint8_t {
  kInvalid,       ///< Data that cannot be used: the first offence, with field, index and value.
  kMissingInput,  ///< An input that a policy needs has not come.
  kPolicyFailed,  ///< A policy threw an exception: its message, said when it begins.
  kWiring,        ///< The router does not choose by its layer's bias, or a handed-out tensor was tied again.
  kUnresponsive,  ///< The load does not answer an actuator.
  kFallback,      ///< Data have been invalid for `safety.fallback_after` steps: said when that is reached.
  kConfig,        ///< The config says something else than the data: said once after construction or load.
  kLog,           ///< The log callback threw an exception: its message.
  kHold,          ///< Some ranks hold, by hold() or MOECTL_HOLD, and so all do: said when that begins.
};
inline constexpr int kNoticeKindCount = 9;
std::string_view name_of(NoticeKind kind);
/// Nothing for an unknown name.
std::optional<NoticeKind> notice_kind_of(std::string_view name);

struct Notice {
  NoticeKind kind = NoticeKind::kConfig;
  int layer = -1;         ///< -1 = of no single layer.
  std::int64_t step = 0;  ///< When it was found.
  std::string_view text;  ///< In UTF-8; cut short beyond some 240 bytes.
};

}  // namespace moectl
