package connpool

import (
	"crypto/tls"
	"errors"
	"log/slog"
	"slices"
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

// check begins to ask for the certificates of u, unless a question of an earlier sweep has not
// ended, or never will: one goroutine at most is lost.
func (u certUses) check(p *Pool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(u) == 0 || p.askingCerts || p.certCalls.Load() > 0 || p.closed {
		return
	}
	p.askingCerts = true
	p.examiners++
	go u.ask(p)
}

// ask asks for the certificate of each use, and retires the connections whose certificate was
// replaced.
func (u certUses) ask(p *Pool) {
	defer func() {
		p.mu.Lock()
		p.askingCerts = false
		p.examiners--
		p.noteLeftLocked()
		p.mu.Unlock()
	}()
	for use, conns := range u {
		now, err := use.ask(p, conns[0].cold.Load().cert)
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

// ask returns the certificate that a dial to the address would present now if the peer asked as it did
// for was.
func (u certUse) ask(p *Pool, was *clientCert) (now certID, err error) {
	type answer struct {
		id  certID
		err error
	}
	got := make(chan answer, 1)
	p.certCalls.Add(1)
	go func() {
		defer p.certCalls.Add(-1)
		a := answer{err: &hookPanic{panicOf("Config.TLSFor or GetClientCertificate", nil)}} // for a runtime.Goexit
		defer func() { got <- a }()
		defer recoverInto(&a.err, "Config.TLSFor or GetClientCertificate")
		from, err := p.tlsSource(u.addr)
		if err == nil {
			request := was.request
			var cert *tls.Certificate
			if cert, err = choose(from, &request); err == nil && cert != nil {
				a.id = idOf(cert)
			}
		}
		a.err = sanitizeError(err)
	}()
	timer := time.NewTimer(askCertPatience)
	defer timer.Stop()
	select {
	case a := <-got:
		return a.id, a.err
	case <-timer.C:
		return certID{}, &lateError{"Config.TLSFor or GetClientCertificate"}
	case <-p.ctx.Done():
		return certID{}, ErrClosed
	}
}
