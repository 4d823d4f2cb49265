package connpool

import (
	"context"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// env is what the code of connections and dials uses of the pool beside the books. No field is
// ever replaced, and each can be used without Pool.mu.
type env struct {
	cfg       Config // the limits in use are in the books
	clock     clock.Clock
	sys       *system
	report    reporter
	observers observers
	loanLog   loanLog             // the loans and who has them
	young     clock.AtTick[*conn] // lent under a ctx since the last tick, see conn_ctx.go
	sessions  *sessionCaches      // TLS sessions to resume

	pool *Pool // for the flows, which change the books and do what these decide
}

// trace returns what observes a use under ctx; nil if nothing does.
func (e *env) trace(ctx context.Context) *Trace { return e.observers.of(ctx, e.cfg.Trace) }
