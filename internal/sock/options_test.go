package sock

import (
	"errors"
	"net"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// each has, for each field of Options, an Options value that sets this field alone.
var each = map[string]Options{
	"DSCP":        {DSCP: 46},
	"Delay":       {Delay: true},
	"KeepAlive":   {KeepAlive: 7 * time.Second},
	"UserTimeout": {UserTimeout: 1234 * time.Millisecond},
	"SendBuffer":  {SendBuffer: 40000},
	"RecvBuffer":  {RecvBuffer: 50000},
}

func TestWhatTheSystemLacksIsRefusedByName(t *testing.T) {
	none := capabilities{}
	for _, field := range reflect.VisibleFields(reflect.TypeFor[Options]()) {
		o, ok := each[field.Name]
		require.True(t, ok, "%s needs an entry in each", field.Name)
		require.False(t, reflect.ValueOf(o).FieldByName(field.Name).IsZero())
		err := none.set(o)
		if assert.ErrorIs(t, err, errors.ErrUnsupported, field.Name) {
			assert.True(t, strings.HasPrefix(err.Error(), "QoS."+field.Name+": "), err.Error())
		}
	}
	assert.ErrorContains(t, none.set(Options{KeepAlive: -1}), "QoS.KeepAlive: ")
	assert.NoError(t, capabilities{noDelay: true}.set(Options{KeepAlive: -1}), "OpenBSD can switch it off")
	assert.NoError(t, none.set(Options{}))
}

// Each field is set either before connecting or after it; no field is set twice.
func TestEachOptionIsEarlyOrLate(t *testing.T) {
	for name, o := range each {
		late := name == "Delay" || name == "KeepAlive"
		assert.Equal(t, late, o.Early() == Options{}, name)
		if !late {
			assert.Equal(t, o, o.Early(), name)
		}
		var untouched net.Conn // a late field would call one of its methods
		if !late {
			assert.NoError(t, o.AfterConnect(untouched), name)
		} else {
			assert.NoError(t, o.BeforeConnect("tcp4", nil), name)
		}
	}
}

// A net.Pipe stands for whatever a user's own dialer may return.
func TestOptionsOfTCPAreRefusedByWhatIsNotTCP(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	err := Options{Delay: true}.AfterConnect(a)
	assert.ErrorIs(t, err, errors.ErrUnsupported)
	assert.ErrorContains(t, err, "QoS.Delay: a *net.pipe is not TCP")
	err = Options{KeepAlive: -1}.AfterConnect(a)
	assert.ErrorIs(t, err, errors.ErrUnsupported)
	assert.ErrorContains(t, err, "QoS.KeepAlive: a *net.pipe is not TCP")
	assert.NoError(t, Options{DSCP: 1}.AfterConnect(a))
}

func TestOptionsOfAClosedConnectionFailByName(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	nc, err := net.Dial("tcp4", ln.Addr().String())
	require.NoError(t, err)
	nc.Close()
	assert.ErrorContains(t, Options{Delay: true}.AfterConnect(nc), "QoS.Delay: ")
	err = Options{KeepAlive: time.Second}.AfterConnect(nc)
	assert.ErrorContains(t, err, "QoS.KeepAlive: ")
	assert.ErrorIs(t, err, net.ErrClosed)
}
