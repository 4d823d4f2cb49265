package connpool

import (
	"context"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// May this idle connection be lent? Its age, the probe (deadcheck.go) and Config.Check say.

// whyUnfit returns why an idle connection must not be lent, ClosedUnknown if it may be
// lent. The caller owns it. The age comes first, because it is the cheapest test; then
// the probe; then Config.Check, if the connection has been idle for long.
func (c *conn) whyUnfit(ctx context.Context) (CloseReason, error) {
	p := c.site.env.pool
	unproven := p.clock.Age(c.since-clock.Instant(c.idleFor), c.since)
	idleFor := unproven
	if e := c.cold.Load(); e != nil && e.fromReserve {
		idleFor = 0
	}
	if reason := p.aged(c, idleFor, c.since); reason != ClosedUnknown {
		return reason, nil
	}
	if reason, err := c.probe(); reason != ClosedUnknown {
		return reason, err
	}
	if p.cfg.Check == nil {
		return ClosedUnknown, nil
	}
	if c.checked != 0 {
		unproven = min(unproven, p.clock.Age(c.checked, c.since))
	}
	// c.since may be earlier than the latest Check, because the borrower read its clock
	// before it had the lock. If CheckAfterIdle is 0, which means no trust, a negative
	// time must not pass for trust.
	if max(0, unproven) < p.cfg.CheckAfterIdle {
		return ClosedUnknown, nil
	}
	return c.ping(ctx)
}

// ping runs Config.Check on c, and probes c afterwards.
func (c *conn) ping(ctx context.Context) (CloseReason, error) {
	p := c.site.env.pool
	asked := false
	defer func() {
		if !asked { // a ctx of the borrower's making panicked
			c.discard(ClosedCheckFailed, nil)
		}
	}()
	err := c.runHook(ctx, true, "Config.Check", p.cfg.Check)
	canceled := ctx.Err() != nil
	asked = true
	if err != nil {
		if canceled {
			return ClosedCanceled, err
		}
		return ClosedCheckFailed, err
	}
	c.checked = p.clock.Exactly()
	if p.cfg.Push != nil {
		if unread, err := c.unread(); err != nil {
			return ClosedCheckFailed, err
		} else if unread {
			return ClosedDirty, ErrUnread
		}
	}
	return c.probe() // the answer may have been longer than Check read
}
