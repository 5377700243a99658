// The policies that come with the library: each .cc beside this file defines one of these.
#pragma once

#include "moectl/limits.h"
#include "moectl/metrics.h"
#include "moectl/policy.h"
#include "moectl/state.h"
#include "moectl/stats.h"

namespace moectl::policies {

PolicyDescription adaptive_bias();
PolicyDescription entropy_temperature();
PolicyDescription fixed();
PolicyDescription multiplicative();
PolicyDescription pi();
PolicyDescription proportional_bias();
PolicyDescription quantile_bias();
PolicyDescription rules();
PolicyDescription schedule();
PolicyDescription sign_bias();
PolicyDescription tanh_momentum_bias();

}  // namespace moectl::policies
