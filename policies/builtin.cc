// One line a policy. Explicit, because a linker drops static initialisers from a static library.
#include "policies/builtin.h"

namespace moectl {

void register_builtin_policies(PolicyRegistry& registry) {
  registry.add(policies::adaptive_bias());
  registry.add(policies::entropy_temperature());
  registry.add(policies::fixed());
  registry.add(policies::multiplicative());
  registry.add(policies::pi());
  registry.add(policies::proportional_bias());
  registry.add(policies::quantile_bias());
  registry.add(policies::rules());
  registry.add(policies::schedule());
  registry.add(policies::sign_bias());
  registry.add(policies::tanh_momentum_bias());
}

}  // namespace moectl
