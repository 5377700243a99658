// One line a policy. Explicit, because a linker drops static initialisers from a static library.
#include "builtin.h"

namespace moectl {

void register_builtin_policies(PolicyRegistry& registry) {
  registry.add(policies::fixed());
}

}  // namespace moectl
