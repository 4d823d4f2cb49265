package connpool

import (
	"crypto/tls"
	"errors"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"
)

// Config.TLSExpiry: each sweep asks which client certificate would be presented now, and retires
// the connections that were made with another one.
//
// The certificate is chosen by code of the user's (Config.TLSFor, GetClientCertificate), so the
// sweep does not wait: one goroutine asks for one address after another. It ends with the pool, or
// when the code does not answer in time.

// askCertPatience bounds one question for a certificate.
const askCertPatience = 5 * time.Second

// certUse is what one question is asked for: the connections of an address that were made with the
// same certificate. Those made with another one may have had another request to choose for.
type certUse struct {
	addr Addr
	id   certID
}

// certAsker is the part of the pool for Config.TLSExpiry.
type certAsker struct {
	pool   *Pool        // never changes
	asking bool         // a goroutine asks for certificates; Pool.mu
	calls  atomic.Int32 // questions that have not ended
}

// certUses are the open connections that a sweep met, by certificate.
type certUses map[certUse][]*conn

// add adds those of the open connections met that were asked for a client certificate. No lock is
// needed: the certificate is fixed once a connection is open.
func (u *certUses) add(met []*conn) {
	for _, c := range met {
		e := c.cold.Load()
		if e == nil || e.cert == nil {
			continue
		}
		if *u == nil {
			*u = make(certUses)
		}
		use := certUse{c.site.addr, e.cert.id}
		(*u)[use] = append((*u)[use], c)
	}
}

// rotates reports whether the client certificate of an address may change.
func (cfg *Config) rotates() bool {
	return cfg.TLSExpiry && (cfg.TLSFor != nil || cfg.TLS != nil && cfg.TLS.GetClientCertificate != nil)
}

// check begins to ask for the certificates of uses, unless a question of an earlier sweep has not
// ended, or never will: one goroutine at most is lost.
func (a *certAsker) check(uses certUses) {
	if len(uses) == 0 {
		return
	}
	p := a.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	if a.asking || a.calls.Load() > 0 || p.closed {
		return
	}
	a.asking = true
	p.examiners++
	go a.askAll(uses)
}

// askAll asks for the certificate of each use, and retires the connections whose certificate was
// replaced.
func (a *certAsker) askAll(uses certUses) {
	p := a.pool
	defer func() {
		p.mu.Lock()
		a.asking = false
		p.examiners--
		p.noteLeftLocked()
		p.mu.Unlock()
	}()
	for use, conns := range uses {
		now, err := a.ask(use.addr, conns[0].cold.Load().cert)
		switch {
		case p.ctx.Err() != nil:
			return
		case err != nil:
			if p.report.outlived(err, use.addr); isLate(err) {
				return
			}
			p.report.log(slog.LevelWarn, "the client certificate cannot be asked for; connections keep theirs", "addr", use.addr, "err", err)
			continue
		case now == use.id || now == certID{}:
			continue
		}
		p.report.log(slog.LevelInfo, "the client certificate was replaced; connections made with the old one are retired", "addr", use.addr, "connections", len(conns))
		why := &retirement{ClosedRetired, errCertReplaced}
		var todo agenda
		p.mu.Lock()
		eachLocked(p, slices.Values(conns), &todo, func(c *conn) { p.retireLocked(c, why, &todo) })
		p.mu.Unlock()
		todo.run(p)
	}
}

var errCertReplaced = errors.New("its client certificate was replaced by another one")

// ask returns the certificate that a dial to addr would present now if the peer asked as it did
// for was.
func (a *certAsker) ask(addr Addr, was *clientCert) (now certID, err error) {
	p := a.pool
	type answer struct {
		id  certID
		err error
	}
	got := make(chan answer, 1)
	a.calls.Add(1)
	go func() {
		defer a.calls.Add(-1)
		said := answer{err: &hookPanic{panicOf("Config.TLSFor or GetClientCertificate", nil)}} // for a runtime.Goexit
		defer func() { got <- said }()
		defer recoverInto(&said.err, "Config.TLSFor or GetClientCertificate")
		from, err := p.tlsSource(addr)
		if err == nil {
			request := was.request
			var cert *tls.Certificate
			if cert, err = choose(from, &request); err == nil && cert != nil {
				said.id = idOf(cert)
			}
		}
		said.err = sanitizeError(err)
	}()
	timer := time.NewTimer(askCertPatience)
	defer timer.Stop()
	select {
	case said := <-got:
		return said.id, said.err
	case <-timer.C:
		return certID{}, &lateError{"Config.TLSFor or GetClientCertificate"}
	case <-p.ctx.Done():
		return certID{}, ErrClosed
	}
}
