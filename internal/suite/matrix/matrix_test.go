package matrix

import (
	"context"
	"fmt"
	"net"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/pooltest"
)

// The identity matrix. Every field of an address, found by reflection, is
// changed, and nothing else; each change must lead to a connection of its own,
// and taking it back to the old one.

// matrixBase is the address that is changed. Every field must be free to change
// alone: hence TLS, which alone has a ServerName beside a port and QoS.
var matrixBase = connpool.Addr{Transport: connpool.TLS, Host: "db.example", Port: 5432}

// matrixMutators gives, for each field, other values than matrixBase has.
var matrixMutators = map[string][]func(*connpool.Addr){
	"Transport":  {func(a *connpool.Addr) { a.Transport = connpool.TCP }, func(a *connpool.Addr) { a.Transport = "other" }},
	"Host":       {func(a *connpool.Addr) { a.Host = "db2.example" }, func(a *connpool.Addr) { a.Host = "192.0.2.1" }, func(a *connpool.Addr) { a.Host = "fe80::1%eth0" }, func(a *connpool.Addr) { a.Host = "fe80::1%eth1" }, func(a *connpool.Addr) { a.Host = "fe80::1" }},
	"Port":       {func(a *connpool.Addr) { a.Port = 5433 }, func(a *connpool.Addr) { a.Port = 1 }},
	"ServerName": {func(a *connpool.Addr) { a.ServerName = "db.example" }, func(a *connpool.Addr) { a.ServerName = "other.example" }},
	"Scope":      {func(a *connpool.Addr) { a.Scope = "tenant" }, func(a *connpool.Addr) { a.Scope = "Tenant" }, func(a *connpool.Addr) { a.Scope = " " }, func(a *connpool.Addr) { a.Scope = "\x00" }},

	"QoS.DSCP":        {func(a *connpool.Addr) { a.QoS.DSCP = 46 }, func(a *connpool.Addr) { a.QoS.DSCP = 8 }},
	"QoS.Delay":       {func(a *connpool.Addr) { a.QoS.Delay = true }},
	"QoS.KeepAlive":   {func(a *connpool.Addr) { a.QoS.KeepAlive = time.Second }, func(a *connpool.Addr) { a.QoS.KeepAlive = -1 }},
	"QoS.UserTimeout": {func(a *connpool.Addr) { a.QoS.UserTimeout = time.Second }, func(a *connpool.Addr) { a.QoS.UserTimeout = time.Millisecond }},
	"QoS.SendBuffer":  {func(a *connpool.Addr) { a.QoS.SendBuffer = 1 << 16 }, func(a *connpool.Addr) { a.QoS.SendBuffer = 1 }},
	"QoS.RecvBuffer":  {func(a *connpool.Addr) { a.QoS.RecvBuffer = 1 << 16 }, func(a *connpool.Addr) { a.QoS.RecvBuffer = 1 }},
}

// matrixFields lists the fields of a struct, those of structs in it by path.
func matrixFields(typ reflect.Type, prefix string) (paths []string) {
	for i := range typ.NumField() {
		f := typ.Field(i)
		if f.Type.Kind() == reflect.Struct {
			paths = append(paths, matrixFields(f.Type, prefix+f.Name+".")...)
			continue
		}
		paths = append(paths, prefix+f.Name)
	}
	return paths
}

// matrixFaults borrows through lend, which returns what identifies the
// connection, and says what is wrong with the answers.
func matrixFaults(typ reflect.Type, lend func(connpool.Addr) (uint64, error)) (faults []string) {
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	home, err := lend(matrixBase)
	if err != nil {
		return []string{err.Error()}
	}
	users := map[uint64]connpool.Addr{home: matrixBase}
	expected := make(map[string]bool)
	for _, path := range matrixFields(typ, "") {
		expected[path] = true
		if len(matrixMutators[path]) == 0 {
			fault("%s has no mutator: it is not known to be a part of the identity", path)
		}
		for i, mutate := range matrixMutators[path] {
			addr := matrixBase
			mutate(&addr)
			if changed := matrixDiff(matrixBase, addr); len(changed) != 1 || changed[0] != path {
				fault("mutator %d of %s changes %q", i, path, changed)
				continue
			}
			id, err := lend(addr)
			if err != nil {
				fault("%s, mutator %d: %v", path, i, err)
				continue
			}
			if other, taken := users[id]; taken {
				fault("%s: %v got the connection of %v", path, addr, other)
			}
			users[id] = addr
			if again, err := lend(addr); err != nil || again != id {
				fault("%s: %v did not get its own connection again (%v)", path, addr, err)
			}
			if back, err := lend(matrixBase); err != nil || back != home {
				fault("%s: with the old value back, the old connection did not come back (%v)", path, err)
			}
		}
	}
	for path := range matrixMutators {
		if !expected[path] {
			fault("there is no field %s any more", path)
		}
	}
	return faults
}

func matrixDiff(a, b connpool.Addr) (paths []string) {
	for _, path := range matrixFields(reflect.TypeFor[connpool.Addr](), "") {
		if !matrixValue(a, path).Equal(matrixValue(b, path)) {
			paths = append(paths, path)
		}
	}
	return paths
}

func matrixValue(a connpool.Addr, path string) reflect.Value {
	v := reflect.ValueOf(a)
	for start, i := 0, 0; i <= len(path); i++ {
		if i == len(path) || path[i] == '.' {
			v = v.FieldByName(path[start:i])
			start = i + 1
		}
	}
	return v
}

// matrixPool lends connections without a network, numbered by their dials.
func matrixPool(t *testing.T) (lend func(connpool.Addr) (uint64, error), dialed func() map[connpool.Addr]int) {
	var mu sync.Mutex
	dials := make(map[connpool.Addr]int)
	dial := func(_ context.Context, addr connpool.Addr) (net.Conn, error) {
		mu.Lock()
		defer mu.Unlock()
		dials[addr]++
		near, far := net.Pipe()
		t.Cleanup(func() { far.Close() })
		return near, nil
	}
	p, err := pooltest.New(connpool.Config{MaxOpen: -1, SweepInterval: -1, Dialers: map[connpool.Transport]connpool.DialFunc{connpool.TCP: dial, connpool.TLS: dial, "other": dial}})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, p.Close()); pooltest.Check(t, p) })
	lend = func(addr connpool.Addr) (id uint64, err error) {
		err = p.With(t.Context(), addr, func(c connpool.Conn) error {
			if c.Addr() != addr {
				return fmt.Errorf("asked for %v, got one of %v", addr, c.Addr())
			}
			id = c.Info().ID
			return nil
		})
		pooltest.Check(t, p)
		return id, err
	}
	return lend, func() map[connpool.Addr]int {
		mu.Lock()
		defer mu.Unlock()
		return dials
	}
}

func TestEveryFieldOfTheAddressIsPartOfTheIdentity(t *testing.T) {
	lend, dialed := matrixPool(t)
	for _, fault := range matrixFaults(reflect.TypeFor[connpool.Addr](), lend) {
		t.Error(fault)
	}
	// The dialer was told each address exactly as it was asked for, once.
	total := 1
	for _, mutators := range matrixMutators {
		total += len(mutators)
	}
	require.Len(t, dialed(), total)
	for addr, n := range dialed() {
		require.Equal(t, 1, n, "%v", addr)
	}
}

// A check of this kind rots unseen, so each way in which it could have nothing
// to say is tried: a field that the key forgets, one that nobody thought of, a
// pool that never reuses.
func TestTheMatrixSeesEachFault(t *testing.T) {
	for _, path := range matrixFields(reflect.TypeFor[connpool.Addr](), "") {
		t.Run("forgotten "+path, func(t *testing.T) {
			lend, _ := matrixPool(t)
			faults := matrixFaults(reflect.TypeFor[connpool.Addr](), func(a connpool.Addr) (uint64, error) {
				switch path { // as if the key did not have it
				case "Transport":
					a.Transport = matrixBase.Transport
				case "Host":
					a.Host = matrixBase.Host
				case "Port":
					a.Port = matrixBase.Port
				case "ServerName":
					a.ServerName = matrixBase.ServerName
				case "Scope":
					a.Scope = matrixBase.Scope
				case "QoS.DSCP":
					a.QoS.DSCP = matrixBase.QoS.DSCP
				case "QoS.Delay":
					a.QoS.Delay = matrixBase.QoS.Delay
				case "QoS.KeepAlive":
					a.QoS.KeepAlive = matrixBase.QoS.KeepAlive
				case "QoS.UserTimeout":
					a.QoS.UserTimeout = matrixBase.QoS.UserTimeout
				case "QoS.SendBuffer":
					a.QoS.SendBuffer = matrixBase.QoS.SendBuffer
				case "QoS.RecvBuffer":
					a.QoS.RecvBuffer = matrixBase.QoS.RecvBuffer
				}
				return lend(a)
			})
			require.Len(t, faults, len(matrixMutators[path]), "%q", faults)
			for _, fault := range faults {
				require.Contains(t, fault, path+": ")
			}
		})
	}
	t.Run("new field", func(t *testing.T) {
		type grown struct {
			Addr   connpool.Addr
			Tunnel struct{ Via string }
		}
		var faults []string
		for _, path := range matrixFields(reflect.TypeFor[grown](), "") {
			if len(matrixMutators[path]) == 0 {
				faults = append(faults, path)
			}
		}
		require.Contains(t, faults, "Tunnel.Via")

		lend, _ := matrixPool(t)
		type tunneled struct {
			Transport, Host, Port, ServerName, Scope string
			QoS                                      connpool.QoS
			Tunnel                                   string
		}
		require.Equal(t, []string{"Tunnel has no mutator: it is not known to be a part of the identity"},
			matrixFaults(reflect.TypeFor[tunneled](), lend))
	})
	t.Run("no reuse", func(t *testing.T) {
		n := uint64(0)
		require.NotEmpty(t, matrixFaults(reflect.TypeFor[connpool.Addr](), func(connpool.Addr) (uint64, error) { n++; return n, nil }))
	})
	t.Run("case folded", func(t *testing.T) {
		lend, _ := matrixPool(t)
		faults := matrixFaults(reflect.TypeFor[connpool.Addr](), func(a connpool.Addr) (uint64, error) {
			if a.Scope == "Tenant" {
				a.Scope = "tenant"
			}
			return lend(a)
		})
		require.Len(t, faults, 1, "%q", faults)
	})
}

// curl CVE-2023-27538: an option was compared, but the comparison could never
// say "different", and no test noticed. Here a key that forgets a part is shown
// to the matrix, field by field; see TestTheMatrixSeesEachFault for the others.
func TestCVE_2023_27538_AComparisonThatNeverDiffersIsNoticed(t *testing.T) {
	lend, _ := matrixPool(t)
	faults := matrixFaults(reflect.TypeFor[connpool.Addr](), func(a connpool.Addr) (uint64, error) {
		const mask = 63
		if flags := int(a.QoS.DSCP) << 6; flags == mask { // what can never be, where & was meant
			a.Scope = "differs"
		}
		a.QoS.DSCP = 0
		return lend(a)
	})
	require.Len(t, faults, len(matrixMutators["QoS.DSCP"]), "%q", faults)
}
