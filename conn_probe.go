package connpool

import (
	"math/rand/v2"
	"net"
)

// adopt makes nc the socket of c.
func (c *conn) adopt(nc net.Conn) {
	env := c.site.env
	c.nc = nc
	c.born = env.clock.Exactly()
	c.since = c.born
	if m := env.cfg.MaxLifetime; m > 0 {
		c.maxAge = m - rand.N(m/10+1)
	}
	c.sock.init(nc, env.sys, &env.cfg)
	if k, ok := nc.(*carrier); ok {
		c.settle(&k.resident)
	}
}

// probe finds out whether the connection may be lent. The caller owns it.
func (c *conn) probe() (CloseReason, error) {
	if r := c.resident(); r != nil {
		return c.probeResident(r)
	}
	if c.word.Load()&flagHungUp != 0 {
		c.word.And(^uint64(flagHungUp)) // before the visit, so that a later hang-up is not missed
		if e := c.cold.Load(); e != nil && e.end != nil {
			return ClosedStale, e.end
		}
	}
	if reason, err := c.condemned(); reason != ClosedUnknown {
		return reason, err
	}
	reason, err := c.sock.probe(&c.site.env.cfg, c.nc)
	c.site.env.report.outlived(err, c.site.addr)
	if reason == ClosedDirty && c.sock.keep {
		c.keepPushback(err)
	}
	return reason, err
}

// keepPushback puts back what a probe has taken out, if err is a plaintext. The caller owns
// c.
func (c *conn) keepPushback(err error) {
	text, ok := err.(*plaintext)
	if !ok {
		return
	}
	e := c.ensureCold()
	if e.pushback == nil {
		e.pushback = new(pushback)
	}
	e.pushback.mu.Lock()
	e.pushback.bytes = append(e.pushback.bytes, text.bytes...)
	e.pushback.mu.Unlock()
}
