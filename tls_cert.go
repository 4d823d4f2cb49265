package connpool

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"reflect"
	"sync/atomic"
	"time"
)

// Config.TLSExpiry: with which certificates a TLS connection was made, and how long these last.
//
// crypto/tls does not say which certificate of its own side a handshake presented. So the
// tls.Config of an address has a GetClientCertificate that chooses as crypto/tls, or the caller's
// function, would, and records the choice in the ctx of the handshake. A handshake that resumes a
// session presents nothing, and the session has the certificate of an earlier handshake, which
// crypto/tls does not say either. So sessions of an address that can present a certificate are
// not resumed. The chain of the peer is known in either case.

// clientCert is a certificate that was presented in a handshake.
type clientCert struct {
	id      certID
	chain   [][]byte                   // in DER, the leaf first; empty: the peer asked for a certificate, and there was none
	request tls.CertificateRequestInfo // what it was chosen for; its Context is done
}

// certID is the hash of a leaf; zero for none.
type certID [sha256.Size]byte

func idOf(cert *tls.Certificate) certID {
	if len(cert.Certificate) == 0 {
		return certID{}
	}
	return sha256.Sum256(cert.Certificate[0])
}

// certKey is the key of a *certSlot in the ctx of a handshake.
type certKey struct{}

// certSlot is where a handshake finds which certificate it has presented. Only the goroutine of
// the handshake uses it.
type certSlot struct{ presented *clientCert }

// presents reports whether a handshake with cfg can present a certificate.
func presents(cfg *tls.Config) bool {
	return cfg.GetClientCertificate != nil || len(cfg.Certificates) > 0
}

// choose returns the certificate that crypto/tls would present under cfg. It is empty if there is
// none.
func choose(cfg *tls.Config, request *tls.CertificateRequestInfo) (*tls.Certificate, error) {
	if cfg.GetClientCertificate != nil {
		return cfg.GetClientCertificate(request)
	}
	for i := range cfg.Certificates {
		if request.SupportsCertificate(&cfg.Certificates[i]) == nil {
			return &cfg.Certificates[i], nil
		}
	}
	return new(tls.Certificate), nil
}

// recorded makes cfg, a copy of from, record what it presents.
func recorded(cfg, from *tls.Config) {
	var last atomic.Pointer[clientCert] // most connections of an address share one
	cfg.ClientSessionCache = nil
	cfg.GetClientCertificate = func(request *tls.CertificateRequestInfo) (*tls.Certificate, error) {
		cert, err := choose(from, request)
		slot, _ := request.Context().Value(certKey{}).(*certSlot)
		if slot == nil || err != nil || cert == nil { // a renegotiation has no slot
			return cert, err
		}
		now := &clientCert{id: idOf(cert), chain: cert.Certificate, request: *request}
		if p := last.Load(); p != nil && p.id == now.id && len(p.chain) == len(now.chain) && p.request.Version == request.Version &&
			reflect.DeepEqual(p.request.SignatureSchemes, request.SignatureSchemes) && reflect.DeepEqual(p.request.AcceptableCAs, request.AcceptableCAs) {
			now = p
		} else {
			last.Store(now)
		}
		slot.presented = now
		return cert, nil
	}
}

// withSlot is the ctx of a handshake that records what it presents.
func withSlot(ctx context.Context) (context.Context, *certSlot) {
	slot := new(certSlot)
	return context.WithValue(ctx, certKey{}, slot), slot
}

// certsLast returns when the first certificate of a connection expires; the zero time if it has
// none. It is an error if the leaf that was presented has expired already: no connection that is
// made with it can be lent, though the peer may not have looked.
func certsLast(presented *clientCert, peer tls.ConnectionState, now time.Time) (end time.Time, err error) {
	if presented != nil {
		for i, der := range presented.chain {
			cert, err := x509.ParseCertificate(der)
			if err != nil {
				return time.Time{}, fmt.Errorf("the client certificate, of which certificate %d cannot be read: %w", i, err)
			}
			switch {
			case cert.NotAfter.After(now):
				end = earlier(end, cert.NotAfter)
			case i == 0:
				return time.Time{}, &brokenContract{fmt.Sprintf("the client certificate of %q ended %v ago: renew it",
					cert.Subject.CommonName, now.Sub(cert.NotAfter).Round(time.Millisecond))}
			}
			// Else an intermediate that has ended is not what the peer has verified the leaf with.
		}
	}
	var last time.Time // of the peer's chains any will do
	for _, chain := range peer.VerifiedChains {
		var first time.Time
		for _, cert := range chain {
			first = earlier(first, cert.NotAfter)
		}
		if first.After(last) {
			last = first
		}
	}
	return earlier(end, last), nil
}

// earlier is the earlier of two times, of which zero is none.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}
